"""Lengths, previews and warnings of prepared data."""

import re

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipelines.config.data_section import DataSection
from pipelines.data.data_warnings import data_markdown, data_warnings
from pipelines.data.inspection import PREVIEW_TOKENS, histogram, previews
from pipelines.data.notes import MEANING
from pipelines.runtime.interfaces.results import (
    CheckResult,
    DataResult,
    LengthHistogram,
    SourceFacts,
    SplitOverlap,
)

SETTINGS = DataSection(source="rows.jsonl", max_tokens=64)
CLEAN = CheckResult(contaminated={}, items=10)


def result(**changes: object) -> DataResult:
    values = {
        "rows": 100,
        "left_out": 0,
        "cut": 0,
        "cut_held_out": 0,
        "train_examples": 90,
        "validation_examples": 10,
        "tuning_examples": 0,
        "train_tokens": 900,
        "template_sha256": "0",
        "supervised_tokens": 300,
        "digest": "0",
        "ends_supervised": 90,
        "lengths": LengthHistogram(upper=(64,), counts=(100,), percentile_99=80, longest=100),
    }
    return DataResult.model_validate(values | changes)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], list(range(1, 500)), [1, 1_000_000]])
def test_the_histogram_counts_every_example(lengths: list[int]) -> None:
    found = histogram(np.array(lengths))
    assert sum(found.counts) == len(lengths)
    assert len(found.counts) == len(found.upper)
    assert found.upper[-1] == found.longest == max(lengths)
    below = 0
    for upper, count in zip(found.upper, found.counts, strict=True):
        below += count
        assert below == sum(length <= upper for length in lengths)


def test_a_preview_has_the_tokens_and_what_is_supervised(chat: PreTrainedTokenizerBase) -> None:
    ids = chat("red red red", add_special_tokens=False).input_ids
    supervised = [False, *[True] * (len(ids) - 1)]
    long = ids * PREVIEW_TOKENS
    rows = {"input_ids": [ids, long], "supervised": [supervised, [True] * len(long)]}
    first, second = previews(Dataset.from_dict(rows), chat)
    assert "".join(first.tokens) == "red red red"
    assert list(first.supervised) == supervised
    assert first.more_tokens == 0
    assert len(second.tokens) == PREVIEW_TOKENS
    assert second.more_tokens == len(long) - PREVIEW_TOKENS


def test_clean_data_have_no_warnings() -> None:
    assert data_warnings(result(), CLEAN, SETTINGS) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cut": 20}, "20 of 100 examples are truncated to data.max_tokens 64.*80 would"),
        ({"left_out": 3}, "3 examples are left out"),
        ({"ends_supervised": 70}, "not supervised in 20 training examples"),
        ({"bad_rows": 4}, "4 rows cannot be learned as written"),
        (
            {"overlap": SplitOverlap(exact=2, near=1, examples=("Box 3",))},
            "2 held-out .* 1 held-out examples nearly .*Box 3",
        ),
        ({"excluded_examples": 5}, "5 training examples are excluded"),
        ({"unused_examples": 6}, "6 examples are neither trained on nor scored"),
        (
            {
                "sources": (
                    SourceFacts(source="a.csv", format="csv", rows=9, unused_columns=("id",)),
                )
            },
            "a.csv: not used are the columns id",
        ),
        *[
            ({"notes": {note: 7}}, f"7 examples: {meaning[:30]}")
            for note, meaning in MEANING.items()
        ],
    ],
)
def test_each_observation_has_one_warning(changes: dict[str, object], words: str) -> None:
    [warning] = data_warnings(result(**changes), CLEAN, SETTINGS)
    assert re.search(words, warning), warning
    assert warning in data_markdown(result(**changes), [warning])


def test_evaluation_items_in_the_training_data_are_reported() -> None:
    check = CheckResult(contaminated={"piqa": 2}, items=40)
    [warning] = data_warnings(result(), check, SETTINGS)
    assert warning.startswith("2 items of piqa are in the training data")
