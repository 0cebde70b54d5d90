"""Lengths of the training examples, and the largest micro-batch of a training."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import load_from_disk

from pipelines.data.batches import balance_by_tokens, order
from pipelines.runtime.interfaces.inputs import PlanInputs


@dataclass(frozen=True)
class LargestMicroBatch:
    """The most that a process reads at once in any step."""

    tokens: int
    supervised: int
    """The most supervised tokens, possibly of another micro-batch."""


@dataclass(frozen=True)
class Examples:
    """The training examples of a data stage, without their text."""

    supervised_masks: list[list[bool]]
    """For each token of each example, whether it is supervised."""

    @classmethod
    def read(cls, data: Path) -> "Examples":
        """Read them from a data stage's folder."""
        return cls(list(load_from_disk(str(data / "train"))["supervised"]))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(mask) for mask in self.supervised_masks]

    def truncate(self, max_tokens: int) -> "Examples":
        """Return the examples truncated on the right."""
        return Examples([mask[:max_tokens] for mask in self.supervised_masks])

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
        lengths = self.lengths
        supervised = [sum(mask) for mask in self.supervised_masks]
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
        lengths = self.lengths
        steps = self._steps(inputs)
        tokens = sum(_sum_of(lengths, step) for step in steps)
        return tokens / len(steps)

    def _steps(self, inputs: PlanInputs) -> list[list[int]]:
        training = inputs.training
        return order(
            len(self.supervised_masks), training.total_steps, training.batch_size, inputs.seed
        )


def _sum_of(numbers: list[int], indices: Iterable[int]) -> int:
    return sum(numbers[index] for index in indices)
