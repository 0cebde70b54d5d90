"""Lengths of the training examples, and the largest micro-batch of a training."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import load_from_disk
from numpy.typing import NDArray

from pipelines.data.batches import balance_by_tokens, order
from pipelines.runtime.interfaces.inputs import PlanInputs


@dataclass(frozen=True)
class LargestMicroBatch:
    """The most that a process reads at once in any step."""

    tokens: int
    supervised: int
    """The most supervised tokens, possibly of another micro-batch."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The training examples of a data stage, without their text."""

    mask: NDArray[np.bool_]
    """For each token of all examples, one after the other, whether it is supervised."""
    lengths: NDArray[np.int64]
    """Tokens of each example."""

    @classmethod
    def read(cls, data: Path) -> "Examples":
        """Read them from a data stage's folder."""
        table = load_from_disk(str(data / "train")).select_columns(["supervised"])
        masks = table.with_format("arrow")[:]["supervised"].combine_chunks()
        lengths = np.asarray(masks.value_lengths(), dtype=np.int64)
        return cls(np.asarray(masks.flatten(), dtype=np.bool_), lengths)

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Supervised tokens of each example."""
        ends = np.cumsum(self.lengths)
        sums = np.concatenate([[0], np.cumsum(self.mask)])
        return np.asarray(sums[ends] - sums[ends - self.lengths], dtype=np.int64)

    def truncate(self, max_tokens: int) -> "Examples":
        """Return the examples truncated on the right."""
        starts = np.cumsum(self.lengths) - self.lengths
        positions = np.arange(len(self.mask)) - np.repeat(starts, self.lengths)
        return Examples(self.mask[positions < max_tokens], np.minimum(self.lengths, max_tokens))

    def largest_micro_batch(
        self, inputs: PlanInputs, accumulation_steps: int | None = None
    ) -> LargestMicroBatch:
        """Return the most tokens, and the most supervised tokens, of any micro-batch.

        Args:
            inputs: the plan's.
            accumulation_steps: micro-batches per step and process; None for those of the inputs.
        """
        if accumulation_steps is None:
            accumulation_steps = inputs.training.gradient_accumulation_steps
        lengths = self.lengths.tolist()
        supervised = self.supervised.tolist()
        parts = inputs.processes * accumulation_steps
        most_tokens = 0
        most_supervised = 0
        for step in self._steps(inputs):
            for indices in balance_by_tokens(step, lengths, parts):
                most_tokens = max(most_tokens, _sum_of(lengths, indices))
                most_supervised = max(most_supervised, _sum_of(supervised, indices))
        return LargestMicroBatch(most_tokens, most_supervised)

    def tokens_of_a_step(self, inputs: PlanInputs) -> float:
        """Return the mean tokens of a step over the training, on all processes together."""
        lengths = self.lengths.tolist()
        steps = self._steps(inputs)
        tokens = sum(_sum_of(lengths, step) for step in steps)
        return tokens / len(steps)

    def _steps(self, inputs: PlanInputs) -> list[list[int]]:
        training = inputs.training
        return order(len(self.lengths), training.total_steps, training.batch_size, inputs.seed)


def _sum_of(numbers: list[int], indices: Iterable[int]) -> int:
    return sum(numbers[index] for index in indices)
