"""Lengths of the training examples, and the largest micro-batch of a training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from pipelines.data.batches import balance_by_tokens, order


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

    def largest_micro_batch(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Return the most tokens, and the most supervised tokens, of any micro-batch."""
        lengths = self.lengths
        supervised = [sum(mask) for mask in self.supervised_masks]
        parts = inputs["processes"] * inputs["training"]["gradient_accumulation_steps"]
        largest = {"tokens": 0, "supervised": 0}
        for step in self._steps(inputs):
            for indices in balance_by_tokens(step, lengths, parts):
                tokens = sum(lengths[index] for index in indices)
                supervised_tokens = sum(supervised[index] for index in indices)
                largest["tokens"] = max(largest["tokens"], tokens)
                largest["supervised"] = max(largest["supervised"], supervised_tokens)
        return largest

    def tokens_of_a_step(self, inputs: dict[str, Any]) -> float:
        """Return the mean tokens of a step over the training, on all processes together."""
        lengths = self.lengths
        steps = self._steps(inputs)
        return sum(lengths[index] for step in steps for index in step) / len(steps)

    def _steps(self, inputs: dict[str, Any]) -> list[list[int]]:
        training = inputs["training"]
        examples = len(self.supervised_masks)
        return order(examples, training["steps"], training["batch_size"], inputs["seed"])
