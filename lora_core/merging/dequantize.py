"""Replace 4-bit layers by dense layers that compute the same, for scoring where memory is not what is short.

Scoring passes over a 4-bit weight many times and makes it dense each time. On a CPU, doing so once is about twice as
fast; the values are the 4-bit ones, so what is measured is still the quantised model.
"""

import torch
from torch import nn

from lora_core.base.quant import BaseWeight, DenseWeight, base_weight, quantised_kind
from lora_core.injection import lora_layers
from lora_core.layers.linear import LoraLinear
from lora_core.modules import module_at, plain_name, replace_module, unwrapped


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype) -> int:
    """Make every 4-bit layer of `model` dense in place, also under adapters; return how many there were.

    Keeps the model's outputs up to the rounding of `dtype`.

    Raises:
        TargetError: bitsandbytes has stored a layer anew; the model is unchanged.
    """
    four_bit = [
        (plain_name(n), m)
        for n, m in unwrapped(model).named_modules()
        if quantised_kind(m) in ("nf4", "fp4")
    ]
    found = {name: base_weight(module) for name, module in four_bit}
    for name, frozen in found.items():
        assert frozen is not None, name
        replace_module(model, name, _dense_linear(module_at(model, name), frozen, dtype))
    for _, layer in lora_layers(model):
        if (
            isinstance(layer, LoraLinear) and type(layer.base) is nn.Linear
        ):  # bitsandbytes' own are of a class below
            layer.frozen = DenseWeight(layer.base)
    return len(found)


def _dense_linear(module: nn.Module, frozen: BaseWeight, dtype: torch.dtype) -> nn.Linear:
    out_features, in_features = frozen.shape
    linear = nn.Linear(
        in_features, out_features, bias=module.bias is not None, device="meta", dtype=dtype
    )
    linear.weight = nn.Parameter(frozen.dense(dtype), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)  # type: ignore[operator]
    return linear
