"""A tree holds every answer as a path, each token once; a token attends to its path alone."""

from itertools import chain

import pytest
from chat_templates import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pipelines.evaluation.trees import (
    Tree,
    bin_pack,
    build_prefix_tree,
    encode,
    group_by_prefix,
    mask,
)

Wholes = list[list[int]]
ANSWERS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=6)
"""Three different tokens, so that answers are equal, share a prefix, or are one."""


def tree_of(wholes: Wholes, starts: list[int] | None = None) -> Tree:
    tree = build_prefix_tree(wholes, starts or [1] * len(wholes))
    assert tree is not None
    return tree


def path_to(tree: Tree, index: int) -> list[int]:
    """Walk to the root by depths alone: the parent is the last token before at one less depth."""
    path = [index]
    while tree.depths[path[0]] > 0:
        depth = tree.depths[path[0]] - 1
        path.insert(0, max(i for i in range(path[0]) if tree.depths[i] == depth))
    return path


@given(ANSWERS)
def test_each_answer_is_a_path(wholes: Wholes) -> None:
    tree = tree_of(wholes)
    for whole, answer in zip(wholes, tree.answers, strict=True):
        path = path_to(tree, answer.predicts[-1])
        assert [tree.tokens[index] for index in path] == whole[:-1]
        assert answer.predicts == path
        assert answer.targets == whole[1:]


@given(ANSWERS)
def test_shared_prefixes_are_read_once(wholes: Wholes) -> None:
    prefixes = set()
    for whole in wholes:
        prefixes |= {tuple(whole[:length]) for length in range(1, len(whole))}
    assert len(tree_of(wholes).tokens) == len(prefixes)


@given(ANSWERS)
def test_a_token_attends_to_its_path_alone(wholes: Wholes) -> None:
    tree = tree_of(wholes)
    for index, row in enumerate(mask(tree).tolist()):
        assert [other for other, is_visible in enumerate(row) if is_visible] == path_to(tree, index)


@given(ANSWERS, st.data())
def test_an_answer_is_scored_from_its_start(wholes: Wholes, data: st.DataObject) -> None:
    starts = [data.draw(st.integers(1, len(whole) - 1)) for whole in wholes]
    for whole, start, answer in zip(wholes, starts, tree_of(wholes, starts).answers, strict=True):
        assert answer.targets == whole[start:]
        assert len(answer.predicts) == len(answer.targets)


def test_the_context_is_that_of_the_longest_answer() -> None:
    assert tree_of([[1, 2, 3], [1, 2, 4, 5, 6]]).context == 4


@pytest.mark.parametrize("start", [0, 3, 4])
def test_an_answer_without_context_or_scored_tokens_gives_none(start: int) -> None:
    assert build_prefix_tree([[1, 2, 3]], [start]) is None


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 60))
def test_packs_hold_every_tree_once_and_no_more_tokens_than_allowed(
    lengths: list[int], tokens: int
) -> None:
    trees = [tree_of([list(range(length + 1))]) for length in lengths]
    groups = list(bin_pack(trees, tokens))
    assert sorted(chain.from_iterable(groups)) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[index] for index in group) <= tokens


@given(ANSWERS, st.data())
def test_answers_to_one_context_share_one_tree(wholes: Wholes, data: st.DataObject) -> None:
    contexts = [data.draw(st.sampled_from("abc")) for _ in wholes]
    groups = list(group_by_prefix(wholes, contexts, 10))
    assert sorted(chain.from_iterable(groups)) == list(range(len(wholes)))
    for context in set(contexts):
        trees = [group for group in groups if context in {contexts[index] for index in group}]
        assert len(trees) == 1


def test_contexts_with_a_common_start_share_one_tree_up_to_its_size() -> None:
    shown, other = list(range(20)), list(range(50, 70))
    wholes = [[*shown, 30, 1], [*other, 30, 1], [*shown, 31, 1], [*shown, 32, 1]]
    assert sorted(map(sorted, group_by_prefix(wholes, list("abcd"), 100))) == [[0, 2, 3], [1]]
    assert sorted(map(len, group_by_prefix(wholes, list("abcd"), 25))) == [1, 1, 2]
    assert len(list(group_by_prefix([[1, 2, 3, 4, 5], [1, 7, 8, 9, 10]], list("ab"), 100))) == 2


def test_texts_have_the_same_tokens_as_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["The quick brown fox", "jumps", "The quick brown fox", "over  the\n lazy dog"]
    found = encode(texts, tokenizer)
    assert found == {text: tokenizer(text).input_ids for text in texts}
    assert encode([], tokenizer) == {}


@pytest.mark.parametrize("around", ["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
def test_a_text_is_read_without_the_token_that_would_end_it(around: str) -> None:
    """With an EOS after each text, an answer would be scored one token too late."""
    tokenizer = make_tokenizer(bos="<s>", around=around)
    encoded = encode(["The box", "The box is red."], tokenizer)
    prompt, complete = encoded.values()
    assert complete[: len(prompt)] == prompt
    start = "<s>" if around.startswith("<s>") else ""
    assert tokenizer.decode(complete) == f"{start}The box is red."
    [without] = encode(["The box"], tokenizer, special=False).values()
    assert tokenizer.decode(without) == "The box"
