"""Groups are never divided between splits, and the same seed gives the same split everywhere."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.splitting import Splits, split_examples
from pipelines.errors import DataError


def split(groups: Sequence[str], held_out: int, seed: int = 7, **options: Any) -> Splits:
    """Split examples with distinct keys; weights are 1 unless given."""
    keys = [f"{number}:{group}" for number, group in enumerate(groups)]
    settings = {"own_validation": None, "weights": [1.0] * len(groups), **options}
    return split_examples(groups, keys, validation_examples=held_out, seed=seed, **settings)


def own(total: int, last: int) -> np.ndarray:
    """Return a mask of the last examples."""
    return np.arange(total) >= total - last


def groups_of(groups: Sequence[str], *parts: np.ndarray) -> set[str]:
    return {groups[index] for part in parts for index in part}


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60),
    st.integers(1, 12),
    st.integers(0, 5),
)
def test_no_group_is_in_train_and_in_another_split(
    groups: list[str], held_out: int, seed: int
) -> None:
    try:
        splits = split(groups, held_out, seed)
    except DataError:
        return
    held_out_groups = groups_of(groups, splits.validation, splits.tuning)
    assert not groups_of(groups, splits.train) & held_out_groups
    assert len(splits.validation) == held_out <= len(splits.train)
    assert len(splits.tuning) <= held_out
    drawn = np.concatenate([splits.train, splits.validation, splits.tuning])
    assert len(set(drawn)) == len(drawn) == len(groups) - splits.unused
    assert splits.excluded == 0


@given(
    st.lists(st.sampled_from("abcdefghijklmnopqrst"), min_size=4, max_size=80),
    st.integers(1, 20),
    st.integers(1, 12),
)
def test_every_example_is_accounted_for_with_own_validation_rows(
    groups: list[str], last: int, held_out: int
) -> None:
    is_own = own(len(groups), last)
    try:
        splits = split(groups, held_out, own_validation=is_own)
    except DataError:
        return
    assert not set(splits.train) & set(np.flatnonzero(is_own))
    assert set(splits.validation) <= set(np.flatnonzero(is_own))
    assert len(splits.validation) == min(held_out, is_own.sum())
    held_out_groups = groups_of(groups, splits.validation, splits.tuning)
    assert not groups_of(groups, splits.train) & held_out_groups
    drawn = np.concatenate([splits.train, splits.validation, splits.tuning])
    assert len(set(drawn)) == len(drawn)
    assert len(drawn) + splits.unused + splits.excluded == len(groups)


@pytest.mark.parametrize(
    ("groups", "held_out"),
    [("abcdef", 4), ("aaaaaaaaab", 2), ("ab", 8), ("a", 2)],
    ids=["too few rows", "one row in another group", "far too few", "one row"],
)
def test_the_error_for_too_few_rows_names_both_numbers(groups: str, held_out: int) -> None:
    counts = f"{len(groups)} usable rows in {len(set(groups))} groups"
    with pytest.raises(DataError, match=rf"{counts} .* validation_examples={held_out}"):
        split(groups, held_out)


def test_rows_of_one_group_are_refused_with_the_setting_that_separates_them() -> None:
    with pytest.raises(DataError, match=r"all 500 usable rows are in one group.*group_column"):
        split(["same prompt"] * 500, 8)


def test_the_split_depends_on_the_seed() -> None:
    groups = [str(number) for number in range(60)]
    first = split(groups, 8, 7)
    assert np.array_equal(first.validation, split(groups, 8, 7).validation)
    assert not np.array_equal(first.validation, split(groups, 8, 8).validation)


def test_the_split_of_a_seed_is_the_same_on_every_machine() -> None:
    """A later version that draws other groups would train on what an earlier run held out."""
    splits = split([f"group {number}" for number in range(40)], 3, 7)
    assert splits.validation.tolist() == [0, 11, 16]


def test_rows_that_are_added_later_do_not_move_others() -> None:
    """No later run trains on held-out rows: a champion is never evaluated on its training data."""
    old = [str(number) for number in range(300)]
    new = [str(number) for number in range(-40, 340)]
    before, after = split(old, 8), split(new, 8)
    held_out_later = groups_of(new, after.validation, after.tuning)
    held_out_before = groups_of(old, before.validation, before.tuning)
    assert not groups_of(old, before.train) & held_out_later
    assert not held_out_before & groups_of(new, after.train)


def test_the_order_of_the_rows_does_not_change_what_is_held_out() -> None:
    groups = [f"g{number % 90}" for number in range(200)]
    keys = [f"key {number}" for number in range(200)]
    forward, backward = (
        split_examples(
            groups[::step],
            keys[::step],
            own_validation=None,
            weights=[1.0] * 200,
            validation_examples=8,
            seed=7,
        )
        for step in (1, -1)
    )
    assert [keys[index] for index in forward.validation] == [
        keys[::-1][index] for index in backward.validation
    ]


def test_own_validation_rows_are_scored_and_the_rest_is_for_tuning() -> None:
    groups = [str(number) for number in range(200)]
    splits = split(groups, 8, own_validation=own(200, 20))
    assert len(splits.validation) == len(splits.tuning) == 8
    assert min(*splits.validation, *splits.tuning) >= 180
    assert splits.unused == 4
    assert splits.train.tolist() == list(range(180))


def test_tuning_examples_come_from_training_rows_if_all_own_rows_are_scored() -> None:
    groups = [str(number) for number in range(400)]
    splits = split(groups, 64, own_validation=own(400, 20))
    assert len(splits.validation) == 20
    assert len(splits.tuning) == 20
    assert splits.tuning.max() < 380
    assert len(splits.train) == 360


def test_tuning_examples_take_at_most_a_tenth_of_the_training_groups() -> None:
    groups = [str(number) for number in range(400)]
    splits = split(groups, 300, own_validation=own(400, 300))
    assert 0 < len(splits.tuning) <= 20
    assert len(splits.train) + len(splits.tuning) == 100


def test_training_rows_of_the_groups_of_own_validation_rows_are_removed() -> None:
    groups = [str(number) for number in range(100)] + ["3", "4", "x"]
    splits = split(groups, 3, own_validation=own(103, 3))
    assert splits.excluded == 2
    assert not {3, 4} & set(splits.train)


@pytest.mark.parametrize(
    ("last", "groups", "reason"),
    [
        (1, "abcdefgh", "1 usable validation rows are too few"),
        (0, "abcdefgh", "0 usable validation rows are too few"),
        (4, "aaaaaaaa", "no training row is left: 4 rows"),
        (8, "abcdefgh", "no training row is left: 0 rows"),
    ],
    ids=["one", "none", "same groups", "only validation rows"],
)
def test_unusable_validation_rows_are_refused(last: int, groups: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        split(groups, 4, own_validation=own(8, last))


@pytest.mark.parametrize(
    ("weight", "occurrences"),
    [(1, {1: 200}), (2, {2: 200}), (0.5, {1: 100}), (1.5, {1: 100, 2: 100}), (0.25, {1: 50})],
)
def test_a_weight_is_how_often_an_example_occurs(
    weight: float, occurrences: dict[int, int]
) -> None:
    groups = [str(number) for number in range(220)]
    splits = split(groups, 20, own_validation=own(220, 40)[::-1], weights=[weight] * 220)
    counts = Counter(Counter(splits.train.tolist()).values())
    trained = 180
    assert len(splits.validation) == len(splits.tuning) == 20
    assert counts == {times: number * trained // 200 for times, number in occurrences.items()}
    assert splits.unused == trained - sum(counts.values())


def test_a_weight_affects_only_its_source_and_not_what_is_held_out() -> None:
    groups = [str(number) for number in range(400)]
    plain = split(groups, 8)
    weighted = split(groups, 8, weights=[1.0] * 200 + [3.0] * 200)
    assert np.array_equal(plain.validation, weighted.validation)
    assert np.array_equal(plain.tuning, weighted.tuning)
    counts = Counter(weighted.train.tolist())
    assert {times for index, times in counts.items() if index < 200} == {1}
    assert {times for index, times in counts.items() if index >= 200} == {3}


def test_weights_that_leave_no_training_example_are_refused() -> None:
    groups = [str(number) for number in range(40)]
    with pytest.raises(DataError, match=r"leave none of \d+ training examples; raise a weight"):
        split(groups, 2, weights=[0.001] * 40)
