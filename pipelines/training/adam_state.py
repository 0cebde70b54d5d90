"""Adam's state by parameter, gathered from all ranks: the same names and shapes under every engine.

    exp_avg, exp_avg_sq    running means of the gradient and of its square, each in its
                           parameter's shape, float32

If the optimizer keeps 8 bits, a mean is its codes, uint8 in the parameter's shape, and under
NAME/absmax the scale of each block of 256, exactly as the optimizer has them. A run that resumes
with another optimizer takes their dequantized values; see `pipelines.training.eight_bit`.

Without DeepSpeed every rank holds the complete state. ZeRO keeps flat shards of it, one on each
rank, and allocates them in its first step; here they are allocated before that step if a run
resumes from a checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.training import eight_bit
from pipelines.training.engine import Engine
from pipelines.training.objective import trained_parameters

KEYS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 24
"""Elements of a rank's shard that are sent to the first rank at once."""
Tensors = dict[str, Tensor]


def full_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield each trained weight by name, on the CPU, in the precision that the optimizer keeps.

    Every rank iterates to the end: each tensor is gathered from all ranks. Under ZeRO-1 and 2 only
    the first rank receives tensors.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    if 0 < engine.zero_stage < 3:
        yield from _gather_flat(engine, lambda flat: flat)
        return
    for name, parameter in trained_parameters(engine.objective).items():
        weight = safe_get_full_fp32_param(parameter) if engine.zero_stage else parameter
        yield name, _cpu_copy(weight)


def full_moments(engine: Engine, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield one of Adam's means by parameter name, after a first step; see `full_weights`.

    Args:
        engine: what is trained.
        key: exp_avg or exp_avg_sq.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    if 0 < engine.zero_stage < 3:
        state = engine.wrapped.optimizer.optimizer.state
        yield from _gather_flat(engine, lambda flat: state[flat][key])
        return
    for name, parameter in trained_parameters(engine.objective).items():
        if engine.zero_stage:
            yield name, _cpu_copy(safe_get_full_optimizer_state(parameter, key))
            continue
        parts = eight_bit.mean_parts(_plain_optimizer(engine).state[parameter], key)
        for ending, part in parts.items():
            yield name + ending, _cpu_copy(part)


def _gather_flat(
    engine: Engine, shard_of: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield on the first rank what ZeRO-1 and 2 shard, by parameter name.

    A few large collectives replace one collective per parameter.

    Args:
        engine: see `full_weights`.
        shard_of: maps this rank's flat shard of the weights to the requested shard, equally long.
    """
    zero = engine.wrapped.optimizer
    names = {parameter: name for name, parameter in trained_parameters(engine.objective).items()}
    for number, flat in enumerate(_flat_weights(zero, engine.zero_stage)):
        full = _gather(engine, shard_of(flat).detach())
        if full is None:
            continue
        parameters = zero.round_robin_bit16_groups[number]
        offsets = zero.round_robin_bit16_offsets[number]
        for parameter, offset in zip(parameters, offsets, strict=True):
            values = full.narrow(0, offset, parameter.numel())
            yield names[parameter], values.view(parameter.shape)


def _gather(engine: Engine, shard: Tensor) -> Tensor | None:
    """Return all ranks' shards, one after the other, on the first rank's CPU; None elsewhere."""
    size = shard.numel()
    full = None
    if engine.is_first:
        full = torch.empty(size * engine.ranks, dtype=shard.dtype)
    for start in range(0, size, PIECE):
        length = min(PIECE, size - start)
        piece = shard.narrow(0, start, length).to(engine.accelerator.device)
        if full is None:
            torch.distributed.gather(piece, None, dst=0)
            continue
        received = [torch.empty_like(piece) for _ in range(engine.ranks)]
        torch.distributed.gather(piece, received, dst=0)
        for rank, part in enumerate(received):
            full.narrow(0, rank * size + start, length).copy_(part)
    return full


def restore(
    engine: Engine,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    step: int,
) -> None:
    """Restore the optimizer's weights and both means, as after `step` steps.

    Every rank calls it with the same tensors.

    Args:
        engine: over a model that already has the weights.
        weights: by parameter name; the optimizer's copy may be more precise than the model's.
        moments: exp_avg and exp_avg_sq, each by parameter name, as `full_moments` yields them.
        step: steps that Adam has taken.
    """
    if engine.zero_stage:
        _allocate_flat_state(engine, step)
    optimizer = _plain_optimizer(engine)
    for name, parameter in trained_parameters(engine.objective).items():
        parts = {key: eight_bit.parts_of(moments[key], name) for key in KEYS}
        if eight_bit.is_eight_bit(optimizer):
            eight_bit.restore(optimizer, parameter, parts, step)
            continue
        means = {key: eight_bit.dequantize(mean, key) for key, mean in parts.items()}
        if engine.zero_stage:
            _set_shards(engine, parameter, weights[name], means)
        else:
            optimizer.state[parameter] = _plain_state(parameter, means, step)


def _plain_state(parameter: nn.Parameter, means: Tensors, step: int) -> Tensors:
    state = {"step": torch.tensor(float(step))}
    for key, mean in means.items():
        state[key] = mean.to(parameter.device, parameter.dtype, copy=True)
    return state


def _plain_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrapper."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def _flat_weights(zero: Any, stage: int) -> list[Tensor]:
    """Return this rank's flat shards of the weights, the keys of DeepSpeed's optimizer state."""
    if stage == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _allocate_flat_state(engine: Engine, step: int) -> None:
    zero = engine.wrapped.optimizer
    for flat in _flat_weights(zero, engine.zero_stage):
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(step)),
            **{key: torch.zeros_like(flat) for key in KEYS},
        }
    if engine.zero_stage < 3:
        # ZeRO-1 and 2 link parameters to their state once, in the first step, when only the first
        # group has any.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_shards(engine: Engine, parameter: nn.Parameter, weight: Tensor, means: Tensors) -> None:
    """Write this rank's shard of a parameter's weight and means."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    device = engine.accelerator.device
    if engine.zero_stage < 3:
        safe_set_full_fp32_param(parameter, weight.float().to(device))
        for key, mean in means.items():
            safe_set_full_optimizer_state(parameter, mean.to(device), key)
        return
    safe_set_local_fp32_param(parameter, _zero3_shard(engine, parameter, weight.float()))
    for key, mean in means.items():
        safe_set_local_optimizer_state(parameter, _zero3_shard(engine, parameter, mean), key)


def _zero3_shard(engine: Engine, parameter: Any, full: Tensor) -> Tensor:
    """Return this rank's shard of a tensor under ZeRO-3, which pads the last one."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * engine.ranks)
    padded[: full.numel()] = full.flatten()
    shard = padded.narrow(0, size * engine.accelerator.process_index, size)
    return shard.to(engine.accelerator.device)


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
