"""Split examples by group: no group is in `train` and in another split.

Only the seed and the group decide on which side a group is. Rows that are added later therefore
move no group, and no later run trains on what an earlier run held out.
"""

from collections import Counter
from typing import Any

from pipelines.data.example import Example
from pipelines.errors import DataError
from pipelines.runtime.stage import digest

HELD_OUT_FRACTION = 0.1
"""Fraction of the groups from which the validation examples are drawn."""


def split_by_group(
    examples: list[Example], validation_examples: int, seed: int
) -> dict[str, list[Example]]:
    """Return the splits train, validation and tuning.

    `validation_examples` are drawn from groups that the seed holds out, and up to as many of the
    remaining examples of those groups are for tuning. A tenth of the groups is held out, and more
    only if that tenth has too few examples.

    Raises:
        DataError: too few rows or groups to hold that many out and still train on most.
    """
    held_out = _held_out_groups(examples, validation_examples, seed)
    candidates = [example for example in examples if example.group in held_out]
    train = [example for example in examples if example.group not in held_out]
    if len(train) < validation_examples or len(candidates) < validation_examples:
        groups = len({example.group for example in examples})
        raise DataError(
            f"{len(examples)} usable rows in {groups} groups are too few to hold out "
            f"validation_examples={validation_examples} and train on at least as many; "
            "lower validation_examples or provide more rows"
        )
    candidates.sort(key=lambda one: hash_uniform(seed, one.input_ids, one.supervised))
    return {
        "train": train,
        "validation": candidates[:validation_examples],
        "tuning": candidates[validation_examples : 2 * validation_examples],
    }


def _held_out_groups(examples: list[Example], validation_examples: int, seed: int) -> set[str]:
    members = Counter(example.group for example in examples)
    drawn = sorted((hash_uniform(seed, group), group) for group in members)
    held_out: set[str] = set()
    held_out_examples = 0
    for number, group in drawn:
        if number >= HELD_OUT_FRACTION and held_out_examples >= validation_examples:
            break
        held_out.add(group)
        held_out_examples += members[group]
    return held_out


def hash_uniform(seed: int, *values: Any) -> float:
    """Return a number in [0, 1) that depends only on the seed and the values."""
    return int(digest([seed, *values])[:13], 16) / 16**13
