"""The largest micro-batch is that of the process with the most tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from pipelines.config.sections import TrainingSection
from pipelines.planning.examples import Examples, LargestMicroBatch
from pipelines.runtime.interfaces.inputs import PlanInputs

MakeInputs = Callable[..., PlanInputs]
TRAINING = TrainingSection(steps=2, batch_size=4)


@pytest.fixture
def inputs(plan_inputs: MakeInputs) -> PlanInputs:
    """Return the inputs of a training on two processes."""
    return plan_inputs(training=TRAINING, processes=2)


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    """Return examples of 10, 20, 30 and 40 tokens, the last two of each supervised."""
    lengths = [10, 20, 30, 40]
    rows = {
        "input_ids": [[1] * length for length in lengths],
        "supervised": [[False] * (length - 2) + [True] * 2 for length in lengths],
    }
    Dataset.from_dict(rows).save_to_disk(tmp_path / "train")
    return Examples.read(tmp_path)


def test_examples_are_balanced_over_processes(examples: Examples, inputs: PlanInputs) -> None:
    """The longest first: 40 + 10 and 30 + 20 tokens, each with two times two supervised tokens."""
    assert examples.largest_micro_batch(inputs) == LargestMicroBatch(tokens=50, supervised=4)


def test_a_single_process_gets_all_examples_of_a_step(
    examples: Examples, plan_inputs: MakeInputs
) -> None:
    inputs = plan_inputs(training=TRAINING, processes=1)
    assert examples.largest_micro_batch(inputs) == LargestMicroBatch(tokens=100, supervised=8)


def test_a_process_reads_its_micro_batches_separately(
    examples: Examples, plan_inputs: MakeInputs
) -> None:
    """Two micro-batches of one process are as large as one of each of two processes."""
    inputs = plan_inputs(training=TRAINING, processes=1)
    assert examples.largest_micro_batch(inputs, 2) == LargestMicroBatch(tokens=50, supervised=4)


def test_tokens_of_a_step_are_those_of_all_processes(
    examples: Examples, inputs: PlanInputs
) -> None:
    assert examples.tokens_of_a_step(inputs) == 100


def test_truncated_examples(examples: Examples, inputs: PlanInputs) -> None:
    """At 25 tokens: 10, 20, 25 and 25, of which only the first two keep their supervised tokens."""
    largest = examples.truncate(25).largest_micro_batch(inputs)
    assert largest == LargestMicroBatch(tokens=45, supervised=2)
