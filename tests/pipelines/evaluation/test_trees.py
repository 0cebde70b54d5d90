"""A tree of tokens holds every answer as a path, each token once; its mask lets a token see its path and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pipelines.evaluation.trees import Tree, build_prefix_tree, encode, group_by_prefix, mask, packs

Wholes = list[list[int]]
ANSWERS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=6)
"""Three kinds of tokens, so that answers share beginnings, are equal, or begin one another."""


def tree_of(wholes: Wholes, starts: list[int] | None = None) -> Tree:
    tree = build_prefix_tree(wholes, starts or [1] * len(wholes))
    assert tree is not None
    return tree


def path_to(tree: Tree, place: int) -> list[int]:
    """Walk to the root by depths alone: the parent is the last token before that lies one less deep."""
    path = [place]
    while tree.depths[path[0]] > 0:
        path.insert(0, max(p for p in range(path[0]) if tree.depths[p] == tree.depths[path[0]] - 1))
    return path


@given(ANSWERS)
def test_each_answer_is_a_path(wholes: Wholes) -> None:
    tree = tree_of(wholes)
    for whole, answer in zip(wholes, tree.answers, strict=True):
        assert [tree.tokens[place] for place in path_to(tree, answer.predicts[-1])] == whole[:-1]
        assert answer.predicts == path_to(tree, answer.predicts[-1])
        assert answer.targets == whole[1:]


@given(ANSWERS)
def test_what_answers_share_is_read_once(wholes: Wholes) -> None:
    beginnings = {tuple(whole[:length]) for whole in wholes for length in range(1, len(whole))}
    assert len(tree_of(wholes).tokens) == len(beginnings)


@given(ANSWERS)
def test_a_token_sees_its_path_and_nothing_else(wholes: Wholes) -> None:
    tree = tree_of(wholes)
    for place, row in enumerate(mask(tree).tolist()):
        assert [other for other, seen in enumerate(row) if seen] == path_to(tree, place)


@given(ANSWERS, st.data())
def test_an_answer_counts_from_where_it_begins(wholes: Wholes, data: st.DataObject) -> None:
    starts = [data.draw(st.integers(1, len(whole) - 1)) for whole in wholes]
    for whole, start, answer in zip(wholes, starts, tree_of(wholes, starts).answers, strict=True):
        assert answer.targets == whole[start:]
        assert len(answer.predicts) == len(answer.targets)


def test_the_context_is_that_of_the_longest_answer() -> None:
    assert tree_of([[1, 2, 3], [1, 2, 4, 5, 6]]).context == 4


@pytest.mark.parametrize("start", [0, 3, 4])
def test_nothing_before_and_nothing_scored_is_no_tree(start: int) -> None:
    assert build_prefix_tree([[1, 2, 3]], [start]) is None


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 60))
def test_packs_hold_every_tree_once_and_no_more_tokens_than_allowed(
    lengths: list[int], tokens: int
) -> None:
    trees = [tree_of([list(range(length + 1))]) for length in lengths]
    groups = list(packs(trees, tokens))
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert all(
        sum(lengths[place] for place in group) <= tokens or len(group) == 1 for group in groups
    )


@given(ANSWERS, st.data())
def test_answers_to_one_context_stand_in_one_tree(wholes: Wholes, data: st.DataObject) -> None:
    contexts = [data.draw(st.sampled_from("abc")) for _ in wholes]
    groups = list(group_by_prefix(wholes, contexts, 10))
    assert sorted(place for group in groups for place in group) == list(range(len(wholes)))
    for context in set(contexts):
        assert sum(any(contexts[place] == context for place in group) for group in groups) == 1


def test_contexts_that_open_alike_stand_in_one_tree_up_to_its_size() -> None:
    shown, other = list(range(20)), list(range(50, 70))
    wholes = [[*shown, 30, 1], [*other, 30, 1], [*shown, 31, 1], [*shown, 32, 1]]
    assert sorted(map(sorted, group_by_prefix(wholes, list("abcd"), 100))) == [[0, 2, 3], [1]]
    assert sorted(map(len, group_by_prefix(wholes, list("abcd"), 25))) == [1, 1, 2]
    assert len(list(group_by_prefix([[1, 2, 3, 4, 5], [1, 7, 8, 9, 10]], list("ab"), 100))) == 2


def test_texts_get_the_tokens_that_they_get_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["The quick brown fox", "jumps", "The quick brown fox", "over  the\n lazy dog"]
    found = encode(texts, tokenizer)
    assert found == {text: tokenizer(text).input_ids for text in texts}
    assert encode([], tokenizer) == {}
