"""How long the training examples are, and how large the largest share of a process is over a whole training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from pipelines.data.batches import order, shares


@dataclass(frozen=True)
class Examples:
    """The training examples of a data stage, without their text."""

    marks: list[list[bool]]
    """Of each token of each example, whether it is supervised."""

    @classmethod
    def read(cls, data: Path) -> "Examples":
        """Read them from a data stage's folder."""
        return cls(list(load_from_disk(str(data / "train"))["supervised"]))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(marks) for marks in self.marks]

    def cut(self, max_tokens: int) -> "Examples":
        """Return the examples cut on the right."""
        return Examples([marks[:max_tokens] for marks in self.marks])

    def largest_share(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Return the most tokens, and the most supervised ones, that any process gets at once in the whole training."""
        lengths, supervised = self.lengths, [sum(marks) for marks in self.marks]
        parts = inputs["processes"] * inputs["training"]["gradient_accumulation_steps"]
        packs = [pack for step in self._steps(inputs) for pack in shares(step, lengths, parts)]
        return {
            "tokens": max(sum(lengths[i] for i in pack) for pack in packs),
            "supervised": max(sum(supervised[i] for i in pack) for pack in packs),
        }

    def tokens_of_a_step(self, inputs: dict[str, Any]) -> float:
        """Return the mean over the training, on all processes together."""
        lengths, steps = self.lengths, self._steps(inputs)
        return sum(lengths[i] for step in steps for i in step) / len(steps)

    def _steps(self, inputs: dict[str, Any]) -> list[list[int]]:
        training = inputs["training"]
        return order(len(self.marks), training["steps"], training["batch_size"], inputs["seed"])
