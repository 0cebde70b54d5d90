"""The order of examples depends on the seed alone, and no target crosses an example's border."""

from itertools import chain, compress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.batches import balance_by_tokens, order
from pipelines.models.packs import pack

Examples = list[dict[str, Any]]


@st.composite
def steps_of_examples(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Draw the lengths of all examples, the indices of one step, and the number of shards."""
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=24))
    parts = draw(st.integers(1, len(lengths)))
    indices = draw(st.permutations(range(len(lengths))))[: draw(st.integers(parts, len(lengths)))]
    return lengths, indices, parts


@st.composite
def tokenized_examples(draw: st.DrawFn) -> Examples:
    """Draw examples whose first token is never supervised, as preparation makes them."""
    drawn = draw(
        st.lists(
            st.lists(st.tuples(st.integers(0, 999), st.booleans()), min_size=1, max_size=9),
            min_size=1,
            max_size=6,
        )
    )
    return [
        {
            "input_ids": [token for token, _ in one],
            "supervised": [index > 0 and learned for index, (_, learned) in enumerate(one)],
        }
        for one in drawn
    ]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
def test_each_epoch_uses_every_example_once(
    examples: int, steps: int, batch_size: int, seed: int
) -> None:
    drawn = [index for step in order(examples, steps, batch_size, seed) for index in step]
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


@given(steps_of_examples())
def test_shards_are_disjoint_and_complete(drawn: tuple[list[int], list[int], int]) -> None:
    lengths, indices, parts = drawn
    shards = balance_by_tokens(indices, lengths, parts)
    assert sorted(chain.from_iterable(shards)) == sorted(indices)
    assert len(shards) == parts


@given(steps_of_examples())
def test_no_shard_is_empty(drawn: tuple[list[int], list[int], int]) -> None:
    lengths, indices, parts = drawn
    assert all(balance_by_tokens(indices, lengths, parts))


@given(steps_of_examples())
def test_shards_differ_by_at_most_one_example(drawn: tuple[list[int], list[int], int]) -> None:
    """The largest shard was the smallest before its last example was added."""
    lengths, indices, parts = drawn
    shards = balance_by_tokens(indices, lengths, parts)
    tokens = [sum(lengths[index] for index in shard) for shard in shards]
    assert max(tokens) - min(tokens) <= max(lengths[index] for index in indices)


@given(steps_of_examples())
def test_a_step_has_the_same_examples_for_any_number_of_shards(
    drawn: tuple[list[int], list[int], int],
) -> None:
    lengths, indices, parts = drawn
    [together] = balance_by_tokens(indices, lengths, 1)
    shards = balance_by_tokens(indices, lengths, parts)
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
