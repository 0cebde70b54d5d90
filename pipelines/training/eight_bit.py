"""What bitsandbytes' 8-bit AdamW keeps of a parameter: codes and scales, or plain float32 where a parameter is small.

    exp_avg       state1, with absmax1 and the code book qmap1 (signed)
    exp_avg_sq    state2, with absmax2 and the code book qmap2 (unsigned)

A mean is the code book's entry times the scale of its block of 256 (Dettmers et al. 2022, arXiv 2110.02861). The code books
are the same in every run, and nothing of them is kept.

A mean's parts: "" → the float32 mean, or the codes (uint8, in the parameter's shape); "/absmax" → the scales (float32).
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


def keeps(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimiser is one of bitsandbytes' with 8 bits."""
    return hasattr(optimizer, "name2qmap")


def parts(state: Mapping[str, Any], key: str) -> Parts:
    """Return a mean's parts from an optimiser's state of a parameter; a plain optimiser has the whole one."""
    if key in state:
        return {CODES: state[key]}
    number = NUMBERS[key]
    scales = (
        {SCALES: state[f"absmax{number}"]} if state[f"state{number}"].dtype is torch.uint8 else {}
    )
    return {CODES: state[f"state{number}"], **scales}


def of(tensors: Mapping[str, Tensor], name: str) -> Parts:
    """Return the parts of one parameter's mean from those of all, by name."""
    return {
        ending: tensors[name + ending] for ending in (CODES, SCALES) if name + ending in tensors
    }


def whole(mean: Parts, key: str) -> Tensor:
    """Return a mean in float32."""
    if SCALES not in mean:
        return mean[CODES]
    values = _code_book(key)[mean[CODES].flatten().int()]
    return (values * mean[SCALES].repeat_interleave(BLOCK)[: values.numel()]).view(
        mean[CODES].shape
    )


@torch.no_grad()
def restore(optimizer: Any, parameter: nn.Parameter, means: Mapping[str, Parts], step: int) -> None:
    """Give an 8-bit optimiser back both means of a parameter, as after `step` steps; codes to the bit, float32 rounded to them."""
    from bitsandbytes.functional import quantize_blockwise

    group, place = _place(optimizer, parameter)
    optimizer.init_state(optimizer.param_groups[group], parameter, group, place)
    state = optimizer.state[parameter]
    state["step"] = step
    for key, mean in means.items():
        held = parts(state, key)
        if SCALES in held and SCALES not in mean:
            codes, rounding = quantize_blockwise(
                mean[CODES].float(), _code_book(key), blocksize=BLOCK
            )
            mean = {CODES: codes, SCALES: rounding.absmax}
        elif SCALES not in held:
            mean = {CODES: whole(mean, key)}
        for ending, tensor in held.items():
            tensor.copy_(mean[ending])


def _place(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """Return the numbers of a parameter's group and of the parameter in it."""
    return next(
        (number, place)
        for number, group in enumerate(optimizer.param_groups)
        for place, one in enumerate(group["params"])
        if one is parameter
    )


@cache
def _code_book(key: str) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    book: Tensor = create_dynamic_map(signed=key == "exp_avg")  # type: ignore[no-untyped-call]
    return book
