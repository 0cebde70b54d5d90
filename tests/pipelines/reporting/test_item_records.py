"""Sample answers and left-out items are read from the item files."""

from pathlib import Path
from typing import Literal

from summaries import Summary, no_answers, parsed

from pipelines.comparison.record_files import json_line
from pipelines.comparison.record_types import LeftOutRecord
from pipelines.reporting.item_records import LeftOut, left_out, samples


def test_without_records_only_the_count_is_reported(summary: Summary) -> None:
    no_answers(summary)
    counts = {row.name: row.count for row in left_out(parsed(summary))}
    assert counts == {"lambada": 2, "passages": 1, "answers": 1}
    summary["items"] = {"rank-4": summary["items"]["rank-4"]}
    assert left_out(parsed(summary)) == [LeftOut("lambada", 2, "")]


def sampled_ids(summary: Summary) -> list[int]:
    ids = []
    for answers in samples(parsed(summary)):
        first = next(iter(answers.values()))
        ids.append(first.id)
    return ids


def test_prompt_left_out_for_one_model_is_not_a_sample(summary: Summary) -> None:
    assert sampled_ids(summary) == [0, 1, 2, 3]
    path = Path(summary["items"]["rank-4"])
    lines = path.read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if '"id": 2,' not in line]
    skipped = left_out_line("generation", "answers", 2, "too long")
    path.write_text(skipped + "\n".join(lines), encoding="utf-8")
    assert sampled_ids(summary) == [0, 1, 3, 4]


def left_out_line(
    kind: Literal["generation", "chat"], benchmark: str, name: int | str, reason: str
) -> str:
    return json_line(
        LeftOutRecord(
            kind=kind, id=name, benchmark=benchmark, prompt_sha256="ab" * 32, left_out=reason
        )
    )


def test_many_reasons_are_abbreviated(summary: Summary) -> None:
    lines = []
    for index in range(5):
        lines.append(left_out_line("chat", "chat", f"chat/{index}", f"reason {index}"))
    Path(summary["items"]["base"]).write_text("".join(lines), encoding="utf-8")
    summary["items"] = {"base": summary["items"]["base"]}
    expected = LeftOut("chat", 5, "reason 0; reason 1; and 3 more like it")
    assert left_out(parsed(summary))[1:] == [expected]
