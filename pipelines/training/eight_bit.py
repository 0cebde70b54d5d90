"""State of bitsandbytes' 8-bit AdamW: codes and scales, or plain float32 if a parameter is small.

    exp_avg       state1, with absmax1 and the code book qmap1 (signed)
    exp_avg_sq    state2, with absmax2 and the code book qmap2 (unsigned)

A mean is the code book's entry times the scale of its block of 256 (Dettmers et al. 2022, arXiv
2110.02861). The code books are the same in every run, so they are not stored.

Parts of a mean: "" → the float32 mean, or the codes (uint8, in the parameter's shape);
"/absmax" → the scales (float32).
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

CODES, SCALES = "", "/absmax"
NUMBERS = {"exp_avg": 1, "exp_avg_sq": 2}
"""Adam's name of a mean → bitsandbytes' number of it."""
BLOCK = 256
Parts = dict[str, Tensor]


def is_eight_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is one of bitsandbytes' 8-bit optimizers."""
    return hasattr(optimizer, "name2qmap")


def mean_parts(state: Mapping[str, Any], key: str) -> Parts:
    """Return a mean's parts from an optimizer's state of a parameter; a plain optimizer has one.

    Args:
        state: of one parameter.
        key: exp_avg or exp_avg_sq.
    """
    if key in state:
        return {CODES: state[key]}
    number = NUMBERS[key]
    codes = state[f"state{number}"]
    if codes.dtype is torch.uint8:
        return {CODES: codes, SCALES: state[f"absmax{number}"]}
    return {CODES: codes}


def parts_of(tensors: Mapping[str, Tensor], name: str) -> Parts:
    """Return the parts of one parameter's mean from those of all parameters, by name.

    Args:
        tensors: parts of one mean of all parameters; an ending after the name tells them apart.
        name: of the parameter.
    """
    endings = [ending for ending in (CODES, SCALES) if name + ending in tensors]
    return {ending: tensors[name + ending] for ending in endings}


def dequantize(mean: Parts, key: str) -> Tensor:
    """Return a mean in float32.

    Args:
        mean: its codes and scales, or the float32 mean itself.
        key: exp_avg or exp_avg_sq.
    """
    codes = mean[CODES]
    if SCALES not in mean:
        return codes
    values = _code_book(key)[codes.flatten().int()]
    scales = mean[SCALES].repeat_interleave(BLOCK)[: values.numel()]
    return (values * scales).view(codes.shape)


@torch.no_grad()
def restore(optimizer: Any, parameter: nn.Parameter, means: Mapping[str, Parts], step: int) -> None:
    """Restore both means of a parameter in an 8-bit optimizer, as after `step` steps.

    Stored codes are restored bit by bit; a stored float32 mean is quantized if the optimizer keeps
    codes.

    Args:
        optimizer: of bitsandbytes, with 8-bit state.
        parameter: that it trains.
        means: exp_avg and exp_avg_sq, each as codes and scales or in float32.
        step: steps that Adam has taken.
    """
    group, index = _position(optimizer, parameter)
    optimizer.init_state(optimizer.param_groups[group], parameter, group, index)
    state = optimizer.state[parameter]
    state["step"] = step
    for key, stored in means.items():
        current = mean_parts(state, key)
        converted = _converted(stored, key, to_codes=SCALES in current)
        for ending, tensor in current.items():
            tensor.copy_(converted[ending])


def _converted(mean: Parts, key: str, *, to_codes: bool) -> Parts:
    from bitsandbytes.functional import quantize_blockwise

    if not to_codes:
        return {CODES: dequantize(mean, key)}
    if SCALES in mean:
        return mean
    codes, quantization = quantize_blockwise(mean[CODES].float(), _code_book(key), blocksize=BLOCK)
    return {CODES: codes, SCALES: quantization.absmax}


def _position(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """Return the index of a parameter's group and the parameter's index in it."""
    for number, group in enumerate(optimizer.param_groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is parameter:
                return number, index
    raise AssertionError("the optimizer does not train this parameter")


@cache
def _code_book(key: str) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    book: Tensor = create_dynamic_map(signed=key == "exp_avg")  # type: ignore[no-untyped-call]
    return book
