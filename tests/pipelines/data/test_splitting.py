"""Groups are never divided between splits, and the same seed gives the same split everywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.example import Example
from pipelines.data.splitting import split_by_group
from pipelines.errors import DataError


def examples_of(*groups: str) -> list[Example]:
    return [Example([1, 2], [False, True], 1, "x", group, False) for group in groups]


def groups_in(splits: dict[str, list[Example]], *names: str) -> set[str]:
    return {example.group for name in names for example in splits[name]}


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60),
    st.integers(1, 12),
    st.integers(0, 5),
)
def test_no_group_is_in_train_and_in_another_split(
    groups: list[str], held_out: int, seed: int
) -> None:
    examples = examples_of(*groups)
    try:
        splits = split_by_group(examples, held_out, seed)
    except DataError:
        return
    assert not groups_in(splits, "train") & groups_in(splits, "validation", "tuning")
    assert len(splits["validation"]) == held_out <= len(splits["train"])
    assert len(splits["tuning"]) <= held_out
    drawn = [id(example) for split in splits.values() for example in split]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(map(id, examples))


@pytest.mark.parametrize(
    ("groups", "held_out"),
    [("abcdef", 4), ("aaaaaaaaaa", 2), ("ab", 8)],
    ids=["too few rows", "one group", "far too few"],
)
def test_the_error_for_too_few_rows_names_both_numbers(groups: str, held_out: int) -> None:
    counts = f"{len(groups)} usable rows in {len(set(groups))} groups"
    with pytest.raises(DataError, match=rf"{counts} .* validation_examples={held_out}"):
        split_by_group(examples_of(*groups), held_out, 7)


def test_the_split_depends_on_the_seed() -> None:
    examples = examples_of(*map(str, range(60)))
    split = split_by_group(examples, 8, 7)
    assert split == split_by_group(examples, 8, 7)
    assert split != split_by_group(examples, 8, 8)


def test_rows_that_are_added_later_do_not_move_others() -> None:
    """No later run trains on held-out rows: a champion is never evaluated on its training data."""
    before = split_by_group(examples_of(*map(str, range(300))), 8, 7)
    after = split_by_group(examples_of(*map(str, range(-40, 340))), 8, 7)
    assert not groups_in(before, "train") & groups_in(after, "validation", "tuning")
    assert not groups_in(before, "validation", "tuning") & groups_in(after, "train")
