"""Held-out examples in the training data are counted exactly; others are not."""

import random
from collections.abc import Callable

import pytest
from datasets import Dataset

from pipelines.data.duplicates import SHINGLE_TOKENS, SIMILARITY, overlap
from pipelines.runtime.interfaces.results import SplitOverlap

Tokens = list[int]


def texts(number: int, length: int, seed: int = 0) -> list[Tokens]:
    draw = random.Random(seed)
    return [draw.choices(range(5000), k=length) for _ in range(number)]


def compare(train: list[Tokens] | Dataset, held_out: list[Tokens]) -> SplitOverlap:
    return overlap(train, held_out, decode=str)


def counts(train: list[Tokens] | Dataset, held_out: list[Tokens]) -> tuple[int, int]:
    result = compare(train, held_out)
    return result.exact, result.near


def jaccard(first: Tokens, second: Tokens) -> float:
    """Return the similarity by definition."""
    one, other = (
        {tuple(text[start : start + SHINGLE_TOKENS]) for start in range(len(text) - 2)}
        for text in (first, second)
    )
    return len(one & other) / len(one | other)


def test_different_texts_do_not_overlap() -> None:
    assert compare(texts(3000, 60), texts(64, 60, seed=1)) == SplitOverlap()


def test_copies_are_counted_once_each() -> None:
    held_out = texts(20, 60)
    train = [*texts(2500, 60, seed=1), *held_out[:3], *held_out[:3]]
    assert counts(train, held_out) == (3, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: [*text, 7],
        lambda text: text[:-1],
        lambda text: [9, *text],
        lambda text: [*text[:30], 9, *text[31:]],
        lambda text: text[:30] + text[31:],
    ],
    ids=["appended", "truncated", "prepended", "replaced", "removed"],
)
def test_a_changed_token_makes_a_near_duplicate(change: Callable[[Tokens], Tokens]) -> None:
    held_out = texts(20, 60)
    train = [*texts(2500, 60, seed=1), change(held_out[4])]
    assert counts(train, held_out) == (0, 1)


def test_near_duplicates_are_those_above_the_similarity_by_definition() -> None:
    held_out = texts(200, 40)
    train = [text[:-number] + [9999] * number for number, text in enumerate(held_out, start=1)]
    pairs = list(zip(train[:39], held_out[:39], strict=True))
    expected = sum(jaccard(*pair) >= SIMILARITY for pair in pairs)
    assert 2 <= expected <= 8
    assert counts(train[:39], held_out) == (0, expected)


def test_an_exact_copy_is_not_counted_as_near_too() -> None:
    held_out = texts(4, 60)
    assert counts([held_out[0], [*held_out[0], 1], [*held_out[1], 1]], held_out) == (1, 1)


def test_a_common_system_prompt_does_not_make_texts_similar() -> None:
    system = texts(1, 400, seed=5)[0]
    train = [system + text for text in texts(300, 20)]
    held_out = [system + text for text in texts(30, 20, seed=1)]
    assert counts(train, held_out) == (0, 0)
    assert counts([*train, held_out[0], [*held_out[1], 3]], held_out) == (1, 1)


def test_a_data_set_and_lists_give_the_same_result() -> None:
    held_out = texts(20, 30)
    train = [*texts(1500, 30, seed=1), held_out[0], held_out[1][:-1], [1, 2], []]
    data = Dataset.from_dict({"input_ids": train, "group": ["x"] * len(train)})
    assert compare(data, held_out) == compare(train, held_out)
    assert counts(data.select(range(1500)), held_out) == (0, 0)
    assert counts(data.shuffle(seed=1), held_out) == (1, 1)


def test_texts_shorter_than_a_shingle_are_compared_exactly() -> None:
    assert counts([[1, 2], [5], []], [[1, 2], [1, 3], [5, 6]]) == (1, 0)
    assert counts([[1, 2]], [[1, 2, 3, 4]]) == (0, 0)


def test_shingles_do_not_cross_the_border_of_two_examples() -> None:
    text = texts(1, 40)[0]
    others = texts(5, 40, seed=1)
    assert counts([text[:20], text[20:]], [text, *others]) == (0, 0)


def test_nothing_held_out_or_trained_on_gives_no_overlap() -> None:
    assert compare(texts(5, 20), []) == SplitOverlap()
    assert compare([], texts(5, 20)) == SplitOverlap()


def test_the_ends_of_three_duplicates_are_shown_in_one_line() -> None:
    held_out = texts(9, 60)
    result = overlap(held_out[:5], held_out, decode=lambda tokens: f"a\n b {tokens}")
    assert result.exact == 5
    assert len(result.examples) == 3
    assert all(text.endswith("]") and len(text) <= 80 for text in result.examples)
    short = overlap([[1, 2, 3]], [[1, 2, 3]], decode=str)
    assert short.examples == ("[1, 2, 3]",)
