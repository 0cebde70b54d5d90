"""One optimizer step: micro-batches forward and backward, the update, a row of metrics.

The loss of a step is the summed negative log-likelihood over all ranks, divided by the step's
supervised tokens over all ranks.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

from pipelines.errors import DivergenceError, MemoryExceededError
from pipelines.models.hardware import peak_memory_bytes
from pipelines.runtime.memory import is_out_of_memory
from pipelines.training.engine import Engine
from pipelines.training.run import Run

FINAL_LR_MULTIPLIER = 0.1
"""Fraction of the peak learning rate at which the schedule ends."""


def train_step(run: Run, engine: Engine, step: int) -> dict[str, Any]:
    """Take one optimizer step; return its row of metrics. A collective: every rank calls it."""
    started = time.perf_counter()
    run.timer.step = step + 1
    learning_rate = engine.set_lr(lr_multiplier(step, run.warmup_steps, len(run.steps)))
    with run.timer.phase("data"):
        supervised = run.supervised_tokens(step)
        packs = run.packs(step)
    # Engines average over ranks and micro-batches, but the loss is a sum over them.
    weight = engine.ranks * len(packs) / supervised
    own_loss = torch.zeros((), device=run.device)
    loss = 0.0
    grad_norm = None
    for number, micro_batch in enumerate(packs, start=1):
        with engine.accelerator.accumulate(engine.wrapped):
            with run.timer.phase("forward"):
                micro_loss = engine.wrapped(micro_batch)
                own_loss += micro_loss.detach()
                if number == len(packs):
                    # Before the last backward pass, because DeepSpeed takes its step inside it.
                    loss = sum_over_ranks(run, own_loss, step)
            with run.timer.phase("backward"):
                engine.accelerator.backward(micro_loss * weight)
            with run.timer.phase("optimizer"):
                engine.fill_gradients()
                grad_norm = engine.clip_gradients(run.max_grad_norm)
                engine.optimizer.step()
                engine.optimizer.zero_grad()
    seconds = time.perf_counter() - started
    tokens = run.tokens_of(run.steps[step])
    return {
        "step": step + 1,
        "steps": len(run.steps),
        "loss": loss / supervised,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "seconds": seconds,
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_of": run.timer.collect(),
        "peak_memory_bytes": peak_memory_bytes(),
        "time": time.time(),
    }


def lr_multiplier(step: int, warmup_steps: int, steps: int) -> float:
    """Return the multiplier of the peak learning rate: a linear warm-up, then cosine to a tenth."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return FINAL_LR_MULTIPLIER + (1 - FINAL_LR_MULTIPLIER) * cosine


def sum_over_ranks(run: Run, own_loss: torch.Tensor, step: int) -> float:
    """Return the sum of a step's loss over all ranks, the only reduction of a loss in the step.

    A collective, once per step. Reading the sum waits for the GPU; apart from the timer's phases,
    the step waits only once more, for the gradient norm.

    Args:
        run: the training.
        own_loss: of this rank, over all its micro-batches.
        step: number of the step, from 0.

    Raises:
        DivergenceError: the loss is not finite on some rank; raised on every rank, before the
            optimizer step.
    """
    total = float(run.accelerator.reduce(own_loss.clone(), reduction="sum"))
    if math.isfinite(total):
        return total
    own_examples = sorted(index for shard in run.shards(step) for index in shard)
    losses = gather_object([(float(own_loss), own_examples)])
    rank = _first_not_finite([value for value, _ in losses])
    value, examples = losses[rank]
    raise DivergenceError(
        f"the loss of step {step + 1} is {value} on rank {rank}, whose examples are "
        f"{', '.join(map(str, examples))}; lower the learning rate, or fix these rows "
        "(the last checkpoint is kept)"
    )


def _first_not_finite(losses: list[float]) -> int:
    """Return the index of the first loss that is not finite; 0 if only their sum overflows."""
    for rank, loss in enumerate(losses):
        if not math.isfinite(loss):
            return rank
    return 0


@contextmanager
def name_memory_limit(work: str, largest_pack_tokens: Callable[[], int]) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one that names the work and its tokens.

    Args:
        work: what is computed, such as "step 3".
        largest_pack_tokens: returns the most tokens that this rank reads at once.

    Raises:
        MemoryExceededError: the work needs too much memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExceededError(
            f"{work} needs more memory than there is, with {largest_pack_tokens():,} tokens at once"
        ) from error
