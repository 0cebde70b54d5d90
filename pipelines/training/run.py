"""The data of one rank: the examples and packs of each step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, load_from_disk

from pipelines.data.batches import balance_by_tokens, order
from pipelines.errors import DataError, PipelineError
from pipelines.models.measurement import Probe
from pipelines.models.packs import Pack, pack
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.training.phase_timer import PhaseTimer

PROBE_TOKENS = 16
"""Tokens of an example whose gradient is compared before training."""
Example = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is the same in all steps of one rank."""

    accelerator: Accelerator
    dataset: Dataset
    lengths: list[int]
    """Tokens of every training example."""
    steps: list[list[int]]
    """Indices of the examples of each step, over all ranks."""
    warmup_steps: int
    """Steps in which the learning rate rises."""
    max_grad_norm: float
    device: str
    timer: PhaseTimer

    def example(self, index: int, step: int) -> Example:
        """Return one example.

        Args:
            index: of a training example.
            step: number of the step that reads it, from 0, for the message.

        Raises:
            DataError: the example cannot be read; names it.
        """
        try:
            example: Example = self.dataset[index]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"example {index}, of step {step + 1}, cannot be read "
                f"({type(error).__name__}: {error}); remove the folder of the prepared data and "
                "run again, which prepares it again (the last checkpoint is kept)"
            ) from error
        return example

    def examples(self) -> Iterator[Example]:
        """Yield the examples of all steps and ranks, in the order of the steps."""
        for step in self.steps:
            for index in step:
                yield self.dataset[index]

    def packs(self, step: int) -> list[Pack]:
        """Return this rank's packs of a step, one per micro-batch."""
        packs: list[Pack] = []
        for shard in self.shards(step):
            examples = [self.example(index, step) for index in shard]
            packs.append(pack(examples, self.device))
        return packs

    def shards(self, step: int) -> list[list[int]]:
        """Return the indices of the examples in each of this rank's packs."""
        rank = self.accelerator.process_index
        return self._all_shards(step)[rank :: self.accelerator.num_processes]

    def _all_shards(self, step: int) -> list[list[int]]:
        micro_batches = self.accelerator.gradient_accumulation_steps
        packs = self.accelerator.num_processes * micro_batches
        return balance_by_tokens(self.steps[step], self.lengths, packs)

    def tokens_of(self, indices: list[int]) -> int:
        """Return the number of tokens of some examples."""
        return sum(self.lengths[index] for index in indices)

    def largest_own_pack(self, step: int) -> int:
        """Return the most tokens that this rank reads at once in a step."""
        return max(map(self.tokens_of, self.shards(step)))

    def supervised_tokens(self, step: int) -> int:
        """Return the number of supervised tokens of a step over all ranks."""
        return sum(sum(self.example(index, step)["supervised"]) for index in self.steps[step])

    def largest_pack_tokens(self) -> int:
        """Return the largest number of tokens that any rank processes at once."""
        largest = 0
        for step in range(len(self.steps)):
            largest = max(largest, *map(self.tokens_of, self._all_shards(step)))
        return largest

    def probes(self) -> list[Probe]:
        """Return the packs on which the forward pass is verified.

        One compares the gradient of two short texts; the other compares the loss of the longest
        example, after a short one.
        """
        used = {index for step in self.steps for index in step}
        by_length = sorted(used, key=lambda index: (self.lengths[index], index))
        shortest = opening(self.example(by_length[0], 0))
        median = opening(self.example(by_length[len(by_length) // 2], 0))
        longest = self.example(by_length[-1], 0)
        return [
            Probe(pack([shortest, median], self.device), gradient=True),
            Probe(pack([shortest, longest], self.device)),
        ]


def opening(example: Example) -> Example:
    """Return the first tokens of an example, all supervised except the first."""
    ids = example["input_ids"][:PROBE_TOKENS]
    return {"input_ids": ids, "supervised": [False] + [True] * (len(ids) - 1)}


def prepare_run(
    accelerator: Accelerator, inputs: TrainInputs, data: Path, timer: PhaseTimer
) -> Run:
    """Load the examples, fix their order and check the shards. Every rank calls it.

    Args:
        accelerator: see `pipelines.training.engine.start`.
        inputs: with the settings of the training.
        data: folder of the prepared data.
        timer: of the phases of this rank.

    Raises:
        PipelineError: the ranks' shards of the first step are not disjoint and complete.
    """
    dataset = load_from_disk(str(data / "train"))
    settings = inputs.training
    run = Run(
        accelerator,
        dataset,
        lengths=dataset["length"][:],
        steps=order(len(dataset), settings.steps, settings.batch_size, inputs.seed),
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        device=str(accelerator.device),
        timer=timer,
    )
    _check_shards(run)
    return run


def _check_shards(run: Run) -> None:
    """Check the first step on every rank: its shards, gathered, must be its examples."""
    own = [index for shard in run.shards(0) for index in shard]
    gathered = sorted(gather_object(own))
    expected = sorted(run.steps[0])
    if gathered != expected:
        raise PipelineError(
            f"the ranks' shards of step 1 contain examples {gathered}, but the step has "
            f"{expected}; shards must be disjoint and complete, so check the launch config"
        )
