"""Replace 4-bit layers by dense layers with the same values, for scoring if memory allows it.

Scoring reads a 4-bit weight many times and dequantizes it every time. On a CPU, dequantizing once
is about twice as fast. The values are the 4-bit ones, so the scores still are those of the
quantized model.
"""

import torch
from torch import nn

from lora_core.base.quant import BaseWeight, base_weight, quantized_kind
from lora_core.modules import module_at, plain_name, replace_module, unwrapped


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype) -> int:
    """Make every 4-bit layer of `model` dense in place, also under adapters.

    The model's outputs change only by the rounding of `dtype`.

    Args:
        model: changed in place.
        dtype: of the dense weights.

    Returns:
        The number of layers that were replaced.

    Raises:
        TargetError: bitsandbytes has repacked a layer; the model is unchanged.
    """
    weights: dict[str, BaseWeight | None] = {}
    for name, module in unwrapped(model).named_modules():
        if quantized_kind(module) in ("nf4", "fp4"):
            weights[plain_name(name)] = base_weight(module)
    for name, weight in weights.items():
        assert weight is not None, name
        quantized = module_at(model, name)
        linear = _dense_linear(quantized, weight, dtype)
        replace_module(model, name, linear)
    return len(weights)


def _dense_linear(module: nn.Module, frozen: BaseWeight, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen layer with the values of `frozen` and the bias of `module`."""
    out_features, in_features = frozen.shape
    has_bias = module.bias is not None
    linear = nn.Linear(
        in_features,
        out_features,
        bias=has_bias,
        device="meta",
        dtype=dtype,
    )
    weight = frozen.dense(dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        bias = module.bias.detach().to(dtype)  # type: ignore[operator]
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
