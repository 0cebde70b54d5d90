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
from torch import Tensor

from pipelines.errors import DivergenceError, MemoryExceededError
from pipelines.models.hardware import peak_memory_bytes
from pipelines.models.packs import Pack
from pipelines.runtime.memory import is_out_of_memory
from pipelines.training.engine import Engine
from pipelines.training.run import Run

FINAL_LR_MULTIPLIER = 0.1
"""Fraction of the peak learning rate at which the schedule ends."""


def train_step(run: Run, engine: Engine, step: int) -> dict[str, Any]:
    """Take one optimizer step; return its row of metrics. A collective: every rank calls it.

    Args:
        run: the data and settings of this rank.
        engine: what is trained.
        step: number of the step, from 0.

    Returns:
        the row; see `pipelines.training.log` for its keys and units.

    Raises:
        DivergenceError: the loss is not finite; no weight has changed.
    """
    started = time.perf_counter()
    run.timer.step = step + 1
    learning_rate = engine.set_lr(lr_multiplier(step, run.warmup_steps, len(run.steps)))
    with run.timer.phase("data"):
        supervised_tokens = run.supervised_tokens(step)
        packs = run.packs(step)
    own_loss = _accumulate_gradients(engine, packs, supervised_tokens)
    with run.timer.phase("optimizer"):
        loss, grad_norm = _update(run, engine, own_loss, step)
    seconds = time.perf_counter() - started
    tokens = run.tokens_of(run.steps[step])
    return {
        "step": step + 1,
        "steps": len(run.steps),
        "loss": loss / supervised_tokens,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "supervised_tokens": supervised_tokens,
        "seconds": seconds,
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_of": run.timer.collect(),
        "peak_memory_bytes": peak_memory_bytes(),
        "time": time.time(),
    }


def _accumulate_gradients(engine: Engine, packs: list[Pack], supervised_tokens: int) -> Tensor:
    """Read this rank's micro-batches forward and backward; return the sum of their losses.

    Args:
        engine: gets the gradients, reduced over all ranks after the last micro-batch.
        packs: the micro-batches.
        supervised_tokens: of the step, over all ranks.
    """
    # Engines average over ranks and micro-batches, but the loss is a sum over them.
    weight = engine.ranks * len(packs) / supervised_tokens
    own_loss = torch.zeros((), device=engine.accelerator.device)
    for micro_batch in packs:
        with engine.accelerator.accumulate(engine.wrapped):
            with engine.timer.phase("forward"):
                micro_loss = engine.wrapped(micro_batch)
                own_loss += micro_loss.detach()
            with engine.timer.phase("backward"):
                engine.backward(micro_loss * weight)
    return own_loss


def _update(run: Run, engine: Engine, own_loss: Tensor, step: int) -> tuple[float, float | None]:
    """Check the step's loss and take the optimizer step; return loss and gradient norm.

    `sum_and_read` has the step's only reduction of a loss, and it is the only place where the host
    waits for the GPU: loss and norm are read together. DeepSpeed computes the norm in its step,
    which waits for the GPU once more; so does a float16 step, to see whether gradients overflowed.

    Args:
        run: the data of this rank.
        engine: has the gradients of all micro-batches.
        own_loss: (), the sum over this rank's micro-batches.
        step: number of the step, from 0.

    Returns:
        the sum of the loss over all ranks in nats, and the gradient norm before clipping.

    Raises:
        DivergenceError: the loss is not finite on some rank; raised on every rank, before the
            optimizer step.
    """
    norm = engine.clip_gradients(run.max_grad_norm)
    loss, grad_norm = engine.sum_and_read(own_loss, norm)
    if not math.isfinite(loss):
        raise _divergence(run, engine, own_loss, step)
    engine.update()
    if engine.zero_stage:
        grad_norm = engine.deepspeed_grad_norm()
    return loss, grad_norm


def _divergence(run: Run, engine: Engine, own_loss: Tensor, step: int) -> DivergenceError:
    """Return the error that names the rank whose loss is not finite. A collective."""
    own_examples = sorted(index for shard in run.shards(step) for index in shard)
    losses = engine.gather((float(own_loss), own_examples))
    rank = _first_not_finite([value for value, _ in losses])
    value, examples = losses[rank]
    return DivergenceError(
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


def lr_multiplier(step: int, warmup_steps: int, steps: int) -> float:
    """Return the multiplier of the peak learning rate: a linear warm-up, then cosine to a tenth.

    Args:
        step: number of the step, from 0.
        warmup_steps: steps before the peak; the first one is above 0 already.
        steps: of the training.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return FINAL_LR_MULTIPLIER + (1 - FINAL_LR_MULTIPLIER) * cosine


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
