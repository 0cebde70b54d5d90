"""BaseWeight: the frozen matrix under an adapter, behind one seam, however it is stored.

A `Linear` holds its weight dense; bitsandbytes' `Linear4bit` holds it in NF4 codes of 4 bits with a scale per
block (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). An adapter asks either for the dense matrix and nothing else.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lora_core.errors import TargetError

Kind = Literal["dense", "nf4"]


class BaseWeight(Protocol):
    """A frozen weight W0 of shape (out, in)."""

    @property
    def kind(self) -> Kind: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def stored(self) -> Tensor:
        """The tensor that holds the weight: W0 itself, or its packed codes."""

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the base itself would compute on `x`."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W0 as a dense (out, in) tensor of `dtype`."""


@dataclass(frozen=True)
class DenseWeight:
    """The weight of an `nn.Linear`."""

    module: nn.Linear
    kind: Kind = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.module.out_features, self.module.in_features)

    @property
    def stored(self) -> Tensor:
        return self.module.weight

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.module.weight.to(dtype)


@dataclass(frozen=True)
class Nf4Weight:
    """The weight of a bitsandbytes `Linear4bit` of type nf4, with or without double quantisation."""

    module: Any
    kind: Kind = "nf4"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.module.out_features, self.module.in_features)

    @property
    def stored(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.module.compute_dtype or x.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = self.module.weight
        state = copy(weight.quant_state)
        state.dtype = dtype  # dequantise straight to `dtype`, as the base does: a detour over bfloat16 would lose bits
        return dequantize_4bit(weight.data, state)


def base_weight(module: nn.Module) -> BaseWeight | None:
    """Return the seam over `module`'s weight, or None where LoRA cannot adapt such a module."""
    if is_nf4(module):
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise TargetError("a 4-bit layer was stored anew when the base was evaluated; load the base again and adapt it before that")
        return Nf4Weight(module)
    if type(module) is nn.Linear:
        return DenseWeight(module)
    return None


def is_nf4(module: nn.Module) -> bool:
    """Tell whether `module` is bitsandbytes' 4-bit linear of type nf4; bitsandbytes itself is not imported."""
    if type(module).__name__ != "Linear4bit" or not type(module).__module__.startswith("bitsandbytes"):
        return False
    return getattr(module.weight, "quant_type", None) == "nf4"


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from storing a 4-bit layer anew, rounded and in another order, when it is first evaluated.

    It does so on processors with AVX512-BF16; the codes would no longer be those that the fingerprint names.
    """
    for module in model.modules():
        if is_nf4(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
