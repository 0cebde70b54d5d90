"""Records are stored one JSON object a line, and anything else in a file is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.comparison.record_files import parse_record, read_items, write_items
from pipelines.comparison.record_types import (
    ChatRecord,
    ChoiceRecord,
    GenerationRecord,
    LeftOutRecord,
    PassageRecord,
    ScoreRecord,
    SingleAnswerRecord,
    TaskRecord,
)
from pipelines.errors import PipelineError

Values = dict[str, Any]
DIGEST = "ab" * 32
TASK = {"kind": "task", "id": 3, "prompt_sha256": DIGEST, "nll": 2.5, "tokens": 4}
STORED = [
    (TASK, TaskRecord),
    (
        {
            "kind": "generation",
            "id": 0,
            "benchmark": "answers",
            "prompt_sha256": DIGEST,
            "prompt": "Größe?",
            "reference": "0 µm",
            "answer": "∞",
            "metrics": {"chrf": 12.5, "exact_match": 0.0},
            "errors": {"execution": "took longer than 5 s"},
            "ended": False,
        },
        GenerationRecord,
    ),
    (
        {
            "kind": "general",
            "id": "piqa/7",
            "benchmark": "piqa",
            "prompt_sha256": DIGEST,
            "gold": 1,
            "log_likelihoods": [-3.25, -1.5],
            "bytes": [6, 4],
            "greedy": [False, True],
        },
        ChoiceRecord,
    ),
    (
        {
            "kind": "answer",
            "id": "mine/1",
            "benchmark": "mine",
            "prompt_sha256": DIGEST,
            "nll": 3.0,
            "tokens": 2,
            "bytes": 8,
            "greedy": True,
        },
        SingleAnswerRecord,
    ),
    (
        {
            "kind": "score",
            "id": "written/0",
            "benchmark": "written",
            "prompt_sha256": DIGEST,
            "metric": "chrf",
            "value": 31.0,
            "higher_is_better": True,
            "ended": False,
        },
        ScoreRecord,
    ),
    (
        {
            "kind": "score",
            "id": "read/0",
            "benchmark": "read",
            "prompt_sha256": DIGEST,
            "metric": "bits_per_byte",
            "value": 0.75,
            "higher_is_better": False,
            "log_likelihoods": [-40.5],
        },
        ScoreRecord,
    ),
    (
        {
            "kind": "text",
            "id": "lambada/3",
            "benchmark": "passages",
            "prompt_sha256": DIGEST,
            "nll": 80.0,
            "tokens": 40,
            "bytes": 160,
        },
        PassageRecord,
    ),
    (
        {
            "kind": "chat",
            "id": "arc_easy/5",
            "benchmark": "chat",
            "prompt_sha256": DIGEST,
            "nll": 9.5,
            "tokens": 3,
            "rows": [12, 15],
        },
        ChatRecord,
    ),
    (
        {
            "kind": "general",
            "id": "piqa/8",
            "benchmark": "piqa",
            "prompt_sha256": DIGEST,
            "left_out": "613 tokens exceed the context of 512",
        },
        LeftOutRecord,
    ),
    (
        {
            "kind": "generation",
            "id": 6,
            "benchmark": "answers",
            "prompt_sha256": DIGEST,
            "prompt": "Why?",
            "reference": "Because.",
            "left_out": "613 tokens exceed the context of 512",
        },
        LeftOutRecord,
    ),
]
"""Each kind of record as it is stored, in the order of its fields, with its type."""


def test_a_file_is_written_as_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    lines = [json.dumps(values, ensure_ascii=False) + "\n" for values, _ in STORED]
    path.write_text("".join(lines), encoding="utf-8")
    records = read_items(path)
    assert [type(record) for record in records] == [kind for _, kind in STORED]
    again = tmp_path / "again.jsonl"
    write_items(again, records)
    assert again.read_bytes() == path.read_bytes()


def test_a_stored_record_equals_the_record_that_was_written(tmp_path: Path) -> None:
    record = ChoiceRecord(
        id="piqa/7",
        benchmark="piqa",
        prompt_sha256=DIGEST,
        gold=0,
        log_likelihoods=(-0.1 - 0.2, -1e-300),
        bytes=(6, 4),
        greedy=(True, False),
    )
    write_items(tmp_path / "items.jsonl", [record])
    assert read_items(tmp_path / "items.jsonl") == [record]


def test_fields_in_another_order_are_the_same_record() -> None:
    for values, _ in STORED:
        reordered = dict(reversed(values.items()))
        expected = parse_record(json.dumps(values), "line 1")
        assert parse_record(json.dumps(reordered), "line 1") == expected


def test_a_loss_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    """The loss of a model that diverged is NaN, and its evaluation is a result too."""
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({**TASK, "nll": math.nan}) + "\n")
    [record] = read_items(path)
    assert isinstance(record, TaskRecord)
    assert math.isnan(record.nll)


@pytest.mark.parametrize("number", range(len(STORED)))
def test_a_record_without_one_of_its_fields_is_refused(number: int) -> None:
    values, kind = STORED[number]
    optional = {"prompt", "reference"} if kind is LeftOutRecord else set()
    if kind is ScoreRecord:
        optional = {"log_likelihoods", "greedy", "ended"}
    for name in values.keys() - optional:
        rest = {key: value for key, value in values.items() if key != name}
        with pytest.raises(PipelineError, match=r"line 4 of items\.jsonl is not an item record"):
            parse_record(json.dumps(rest), "line 4 of items.jsonl")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "essay"}, "The kind should be one of task, generation, .*'kind': 'essay'"),
        ({"nll": "2.5"}, "nll: Input should be a valid number, not '2.5'"),
        ({"tokens": 4.0}, "tokens: Input should be a valid integer, not 4.0"),
        ({"loss": 1.0}, "loss: Unexpected keyword argument, not 1.0"),
        ({"left_out": "too long"}, "left_out.kind: Input should be 'generation', .*, not 'task'"),
    ],
)
def test_an_invalid_record_is_refused_with_its_field_and_value(
    change: Values, problem: str
) -> None:
    with pytest.raises(PipelineError, match=problem):
        parse_record(json.dumps({**TASK, **change}), "line 1 of items.jsonl")


@pytest.mark.parametrize("line", ["", "{", "[1]", "3", "null", '{"kind": ["task"]}'])
def test_what_is_not_a_record_at_all_is_refused(line: str) -> None:
    with pytest.raises(PipelineError, match=r"line 1 of items\.jsonl is not an item record"):
        parse_record(line, "line 1 of items.jsonl")


def test_a_damaged_file_is_refused_with_the_number_of_the_line(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(TASK) + "\n" + json.dumps(TASK)[:20])
    with pytest.raises(PipelineError, match=r"line 2 of .*items\.jsonl is not an item record"):
        read_items(path)
