"""BaseWeight: the frozen matrix under an adapter, behind one seam, however it is stored.

A `Linear` holds its weight dense; bitsandbytes' `Linear4bit` holds it in NF4 codes of 4 bits with a scale per
block (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). An adapter asks either for the dense matrix and nothing else.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

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

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = self.module.weight
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


def base_weight(module: nn.Module) -> BaseWeight | None:
    """Return the seam over `module`'s weight, or None where LoRA cannot adapt such a module."""
    if is_nf4(module):
        return Nf4Weight(module)
    if isinstance(module, nn.Linear) and type(module).__module__.startswith("torch."):
        return DenseWeight(module)
    return None


def is_nf4(module: nn.Module) -> bool:
    """Tell whether `module` is bitsandbytes' 4-bit linear of type nf4; bitsandbytes itself is not imported."""
    if type(module).__name__ != "Linear4bit" or not type(module).__module__.startswith("bitsandbytes"):
        return False
    return getattr(module.weight, "quant_type", None) == "nf4"
