"""The order of examples depends on the seed alone, and no target crosses an example's border."""

from itertools import chain, compress
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.batches import balance_by_tokens, order
from pipelines.models.packs import pack

Examples = list[dict[str, Any]]


class Step(NamedTuple):
    """One optimizer step."""

    lengths: list[int]
    """Of all examples."""
    indices: list[int]
    """Of the examples in this step."""
    shards: int


@st.composite
def drawn_steps(draw: st.DrawFn) -> Step:
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=24))
    shards = draw(st.integers(1, len(lengths)))
    permutation = draw(st.permutations(range(len(lengths))))
    count = draw(st.integers(shards, len(lengths)))
    return Step(lengths, permutation[:count], shards)


@st.composite
def tokenized_examples(draw: st.DrawFn) -> Examples:
    """Draw examples whose first token is never supervised, as preparation makes them."""
    examples = []
    for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)):
        rest = length - 1
        ids = draw(st.lists(st.integers(0, 999), min_size=length, max_size=length))
        supervised = draw(st.lists(st.booleans(), min_size=rest, max_size=rest))
        examples.append({"input_ids": ids, "supervised": [False, *supervised]})
    return examples


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
def test_each_epoch_uses_every_example_once(
    examples: int, steps: int, batch_size: int, seed: int
) -> None:
    drawn = list(chain.from_iterable(order(examples, steps, batch_size, seed)))
    assert len(drawn) == steps * batch_size
    for start in range(0, len(drawn), examples):
        epoch = drawn[start : start + examples]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(examples))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_a_longer_run_starts_like_a_shorter_one(examples: int, steps: int, batch_size: int) -> None:
    assert order(examples, steps + 3, batch_size, 7)[:steps] == order(
        examples, steps, batch_size, 7
    )


def test_steps_are_full_and_epochs_differ() -> None:
    steps = order(20, 6, 10, 7)
    assert [len(step) for step in steps] == [10] * 6
    epochs = [tuple(steps[i] + steps[i + 1]) for i in (0, 2, 4)]
    assert len(set(epochs)) == 3


def test_the_order_is_drawn_by_the_seed() -> None:
    assert order(50, 5, 10, 7) == order(50, 5, 10, 7) != order(50, 5, 10, 8)


@given(drawn_steps())
def test_shards_are_disjoint_and_complete(step: Step) -> None:
    shards = balance_by_tokens(step.indices, step.lengths, step.shards)
    assert sorted(chain.from_iterable(shards)) == sorted(step.indices)
    assert len(shards) == step.shards


@given(drawn_steps())
def test_no_shard_is_empty(step: Step) -> None:
    assert all(balance_by_tokens(step.indices, step.lengths, step.shards))


@given(drawn_steps())
def test_shards_differ_by_at_most_one_example(step: Step) -> None:
    """The largest shard was the smallest before its last example was added."""
    shards = balance_by_tokens(step.indices, step.lengths, step.shards)
    tokens = [tokens_of(step, shard) for shard in shards]
    longest = max(step.lengths[index] for index in step.indices)
    assert max(tokens) - min(tokens) <= longest


def tokens_of(step: Step, indices: list[int]) -> int:
    return sum(step.lengths[index] for index in indices)


@given(drawn_steps())
def test_a_step_has_the_same_examples_for_any_number_of_shards(
    step: Step,
) -> None:
    [together] = balance_by_tokens(step.indices, step.lengths, 1)
    shards = balance_by_tokens(step.indices, step.lengths, step.shards)
    assert sorted(together) == sorted(chain.from_iterable(shards))


def test_shards_do_not_depend_on_the_order_within_a_step() -> None:
    lengths = [5, 5, 9, 2, 7, 7]
    shards = balance_by_tokens([0, 1, 2, 3, 4, 5], lengths, 3)
    assert shards == balance_by_tokens([5, 3, 1, 4, 2, 0], lengths, 3)


@given(tokenized_examples())
def test_a_target_is_the_token_after_the_one_that_predicts_it(examples: Examples) -> None:
    packed = pack(examples, "cpu")
    assert (packed.input_ids[packed.predicts + 1] == packed.targets).all()
    targets = []
    for example in examples:
        targets += compress(example["input_ids"], example["supervised"])
    assert packed.targets.tolist() == targets


@given(tokenized_examples())
def test_no_prediction_crosses_the_border_of_an_example(examples: Examples) -> None:
    packed = pack(examples, "cpu")
    owner = [number for number, example in enumerate(examples) for _ in example["input_ids"]]
    assert all(owner[index] == owner[index + 1] for index in packed.predicts.tolist())


@given(tokenized_examples())
def test_positions_start_at_0_in_each_segment(examples: Examples) -> None:
    packed = pack(examples, "cpu")
    lengths = [len(example["input_ids"]) for example in examples]
    assert [segment.length for segment in packed.segments] == lengths
    assert all(segment.mask is None for segment in packed.segments)
    positions = chain.from_iterable(range(length) for length in lengths)
    assert packed.position_ids.tolist() == list(positions)
    tokens = chain.from_iterable(example["input_ids"] for example in examples)
    assert packed.input_ids.tolist() == list(tokens)
