"""Sample answers and left-out items are read from the item files."""

import json
from pathlib import Path

from summaries import Summary, no_answers, parsed

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
    lines.insert(0, json.dumps({"kind": "generation", "id": 2, "left_out": "too long"}))
    path.write_text("\n".join(lines), encoding="utf-8")
    assert sampled_ids(summary) == [0, 1, 3, 4]


def test_many_reasons_are_abbreviated(summary: Summary) -> None:
    lines = []
    for index in range(5):
        record = {"kind": "chat", "id": index, "left_out": f"reason {index}"}
        lines.append(json.dumps(record) + "\n")
    Path(summary["items"]["base"]).write_text("".join(lines), encoding="utf-8")
    summary["items"] = {"base": summary["items"]["base"]}
    expected = LeftOut("chat", 5, "reason 0; reason 1; and 3 more like it")
    assert left_out(parsed(summary))[1:] == [expected]
