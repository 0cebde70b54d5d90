"""The loss on held-out examples during training, computed by all ranks together.

The examples are the tuning split of the prepared data, on which the control's learning rate is
chosen too. The validation split is never read here: the number of steps is chosen by this loss, and
a model that was chosen on the examples on which it is then compared would be scored too well.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk

from pipelines.data.batches import balance_by_tokens
from pipelines.errors import DataError, DivergenceError
from pipelines.models.packs import pack
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.training.engine import Engine
from pipelines.training.run import Run

TUNING = "tuning"
"""Folder of the split in the folder of the prepared data."""


@dataclass(frozen=True)
class HeldOutExamples:
    """The tuning examples, and which of them this rank reads."""

    dataset: Dataset
    shards: list[list[int]]
    """Indices of the examples in each of this rank's packs, as many packs as on every other rank;
    a pack may be empty if there are fewer examples than ranks."""
    supervised_tokens: int
    """Of all examples."""
    largest_pack_tokens: int
    """The most tokens that this rank reads at once."""


def load_held_out(run: Run, inputs: TrainInputs, data: Path) -> HeldOutExamples | None:
    """Load the tuning examples, and distribute them by tokens; None without `evaluate_every`.

    A pack has about as many tokens as the largest one of the training, whose memory is known to be
    enough.

    Args:
        run: has the training examples and the ranks.
        inputs: with the settings.
        data: folder of the prepared data.

    Raises:
        DataError: there are no tuning examples.
    """
    if inputs.training.evaluate_every is None:
        return None
    folder = data / TUNING
    if not folder.is_dir():
        raise DataError(
            "training.evaluate_every needs held-out examples for tuning, and the validation "
            "examples leave none; add rows, lower data.validation_examples, or remove "
            "evaluate_every"
        )
    dataset = load_from_disk(str(folder))
    lengths = dataset["length"][:]
    ranks = run.accelerator.num_processes
    by_tokens = math.ceil(sum(lengths) / (ranks * run.largest_pack_tokens()))
    rounds = min(by_tokens, math.ceil(len(lengths) / ranks))
    packs = balance_by_tokens(range(len(lengths)), lengths, ranks * rounds)
    shards = packs[run.accelerator.process_index :: ranks]
    return HeldOutExamples(
        dataset,
        shards,
        supervised_tokens=sum(map(sum, dataset["supervised"])),
        largest_pack_tokens=max(sum(lengths[index] for index in shard) for shard in shards),
    )


def held_out_loss(run: Run, engine: Engine, examples: HeldOutExamples, step: int) -> float:
    """Return the mean held-out loss in nats per supervised token, the same on every rank.

    A collective: every rank calls it and reads equally many packs, because ZeRO-3 gathers the
    weights from all ranks in each pass. It neither changes the weights nor draws random numbers.
    It waits for the GPU once, to read the sum.

    Args:
        run: the training, for its device and timer.
        engine: what is evaluated.
        examples: the packs that this rank reads.
        step: number of steps taken, for the message.

    Raises:
        DivergenceError: the loss is not finite; raised on every rank.
    """
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    with _evaluation_mode(engine):
        for shard in examples.shards:
            with run.timer.phase("evaluation"):
                read = [examples.dataset[index] for index in shard or [0]]
                loss = engine.wrapped(pack(read, run.device))
                if shard:  # a rank without examples only takes part in the pass
                    total += loss
    # Every rank adds the same numbers, exactly, so the result does not depend on their order.
    loss_sum = math.fsum(engine.gather(float(total)))
    loss_of_all = loss_sum / examples.supervised_tokens
    if not math.isfinite(loss_of_all):
        raise DivergenceError(
            f"the held-out loss after step {step} is {loss_of_all}; lower the learning rate "
            "(the last checkpoint is kept)"
        )
    return loss_of_all


@contextmanager
def _evaluation_mode(engine: Engine) -> Iterator[None]:
    """Switch off dropout and gradients inside a block."""
    engine.wrapped.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.wrapped.train()
