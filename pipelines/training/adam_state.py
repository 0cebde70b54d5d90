"""Adam's state by parameter, whole, whoever holds which part of it: the same names and shapes under every engine.

    exp_avg, exp_avg_sq    running means of the gradient and of its square, each in its parameter's shape, float32

Where the optimiser keeps 8 bits, a mean is its codes, uint8 in the parameter's shape, and beside them under NAME/absmax the
scale of each block of 256, as the optimiser has them: to the bit. A run that goes on with another optimiser takes what they
stand for; see `pipelines.training.eight_bit`.

Without DeepSpeed every rank holds all of it. ZeRO keeps flat stretches of it, a share on each rank, and makes them in its
first step; they are made here before that, where a run goes on from a checkpoint.
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
"""Elements of a rank's share that go to the first rank at once."""
Tensors = dict[str, Tensor]


def whole_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield each trained weight by name, on the CPU, in the precision that the optimiser keeps; every rank asks for all.

    Under ZeRO-1 and 2 only the first rank is given any.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    if 0 < engine.zero_stage < 3:
        yield from _whole_flat(engine, lambda flat: flat)
        return
    for name, parameter in trained_parameters(engine.objective).items():
        yield name, _copied(safe_get_full_fp32_param(parameter) if engine.zero_stage else parameter)


def whole_moments(engine: Engine, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield one of Adam's means by parameter name, on the CPU, after a first step; see `whole_weights`."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if 0 < engine.zero_stage < 3:
        state = engine.wrapped.optimizer.optimizer.state
        yield from _whole_flat(engine, lambda flat: state[flat][key])
        return
    for name, parameter in trained_parameters(engine.objective).items():
        if engine.zero_stage:
            yield name, _copied(safe_get_full_optimizer_state(parameter, key))
        else:
            parts = eight_bit.parts(_plain(engine).state[parameter], key)
            yield from ((name + ending, _copied(part)) for ending, part in parts.items())


def _whole_flat(
    engine: Engine, share_of: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield on the first rank what ZeRO-1 and 2 share out, by parameter name: a few large collectives, and not one for each.

    Args:
        engine: see `whole_weights`.
        share_of: from this rank's flat stretch of the weights to the stretch that is asked for, of the same length.
    """
    zero = engine.wrapped.optimizer
    names = {parameter: name for name, parameter in trained_parameters(engine.objective).items()}
    for number, flat in enumerate(_flat_weights(zero, engine.zero_stage)):
        whole = _gathered(engine, share_of(flat).detach())
        if whole is not None:
            for parameter, start in zip(
                zero.round_robin_bit16_groups[number],
                zero.round_robin_bit16_offsets[number],
                strict=True,
            ):
                yield (
                    names[parameter],
                    whole.narrow(0, start, parameter.numel()).view(parameter.shape),
                )


def _gathered(engine: Engine, share: Tensor) -> Tensor | None:
    """Return all ranks' stretches, one after the other, on the first rank's CPU; None elsewhere."""
    size, device = share.numel(), engine.accelerator.device
    whole = torch.empty(size * engine.ranks, dtype=share.dtype) if engine.is_first else None
    for start in range(0, size, PIECE):
        piece = share.narrow(0, start, min(PIECE, size - start)).to(device)
        parts = [torch.empty_like(piece) for _ in range(engine.ranks)] if engine.is_first else None
        torch.distributed.gather(piece, parts, dst=0)
        for rank, part in enumerate(parts or []):
            assert whole is not None
            whole.narrow(0, rank * size + start, piece.numel()).copy_(part)
    return whole


def restore(
    engine: Engine,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    step: int,
) -> None:
    """Give the optimiser back its weights and both means, as after `step` steps. Every rank calls it with the same tensors.

    Args:
        engine: made over a model that holds the weights already.
        weights: by parameter name; what the optimiser keeps may be finer than what the model holds.
        moments: exp_avg and exp_avg_sq, each by parameter name, as `whole_moments` yields them.
        step: steps that Adam has taken.
    """
    if engine.zero_stage:
        _make_flat_state(engine, step)
    optimizer = _plain(engine)
    in_8_bits = eight_bit.keeps(optimizer)
    for name, parameter in trained_parameters(engine.objective).items():
        if in_8_bits:
            eight_bit.restore(
                optimizer, parameter, {key: eight_bit.of(moments[key], name) for key in KEYS}, step
            )
            continue
        means = {key: eight_bit.whole(eight_bit.of(moments[key], name), key) for key in KEYS}
        if engine.zero_stage:
            _set_shares(engine, parameter, weights[name], means)
        else:
            copies = {
                key: mean.to(parameter.device, parameter.dtype, copy=True)
                for key, mean in means.items()
            }
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **copies}


def _plain(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimiser under what accelerate put around it."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def _flat_weights(zero: Any, stage: int) -> list[Tensor]:
    """Return this rank's flat stretches of the weights, by which DeepSpeed's own optimiser knows its state."""
    return list(
        zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    )


def _make_flat_state(engine: Engine, step: int) -> None:
    zero = engine.wrapped.optimizer
    for flat in _flat_weights(zero, engine.zero_stage):
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(step)),
            **{key: torch.zeros_like(flat) for key in KEYS},
        }
    _link_state(engine)


def _link_state(engine: Engine) -> None:
    """Let ZeRO-1 and 2 find the state of every parameter: in its first step it looks once, when only the first group has any."""
    if 0 < engine.zero_stage < 3:
        zero = engine.wrapped.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_shares(engine: Engine, parameter: nn.Parameter, weight: Tensor, means: Tensors) -> None:
    """Write this rank's share of a parameter's weight and means."""
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
    safe_set_local_fp32_param(parameter, _share(engine, parameter, weight.float()))
    for key, mean in means.items():
        safe_set_local_optimizer_state(parameter, _share(engine, parameter, mean), key)


def _share(engine: Engine, parameter: Any, whole: Tensor) -> Tensor:
    """Return this rank's stretch of a tensor under ZeRO-3, which pads the last one."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * engine.ranks)
    padded[: whole.numel()] = whole.flatten()
    share: Tensor = padded.narrow(0, size * engine.accelerator.process_index, size).to(
        engine.accelerator.device
    )
    return share


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
