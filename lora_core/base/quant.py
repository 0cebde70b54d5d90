"""BaseWeight: the frozen matrix under an adapter, behind one seam, however it is stored.

    dense   a `Linear`'s weight (out, in), or a Hugging Face `Conv1D`'s (in, out), which is seen turned
    nf4 fp4 bitsandbytes' `Linear4bit`: codes of 4 bits with a scale per block (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)
    int8    bitsandbytes' `Linear8bitLt`: codes of 8 bits with a scale per row (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339)

An adapter asks for the base's own product, to the bit, and for the dense matrix, from which it forms gradients.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base.nf4 import dequantised
from lora_core.errors import TargetError

Kind = Literal["dense", "nf4", "fp4", "int8"]


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

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W0ᵀ + bias as the base itself computes it, to the bit, also under autocast."""

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        """The dtype in which the base itself would answer on `x`, where its product is `y`."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W0 as a dense (out, in) tensor of `dtype`."""

    def as_stored(self, weight: Tensor) -> Tensor:
        """A dense (out, in) tensor turned the way `stored` lies."""


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

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.dense(x.dtype), bias)

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        return y.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.module.weight.to(dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight


@dataclass(frozen=True)
class SubclassedWeight(DenseWeight):
    """The weight of a subclass of `nn.Linear` that forms the same product in a way of its own, such as Falcon's."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not self.module.bias or self.module.weight.dtype != x.dtype:
            return super().linear(x, bias)
        y: Tensor = type(self.module).forward(self.module, x)
        return y


@dataclass(frozen=True)
class TransposedWeight:
    """The weight of a Hugging Face `Conv1D`, a linear layer that stores (in, out)."""

    module: Any
    kind: Kind = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        wide, out = self.module.weight.shape
        return (out, wide)

    @property
    def stored(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]), self.module.weight.to(x.dtype)
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        return y.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        turned: Tensor = self.module.weight.T
        return turned.to(dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()


@dataclass(frozen=True)
class FourBitWeight:
    """The weight of a bitsandbytes `Linear4bit`, with or without double quantisation."""

    module: Any

    @property
    def kind(self) -> Kind:
        kind: Kind = self.module.weight.quant_type
        return kind

    @property
    def shape(self) -> tuple[int, int]:
        return (self.module.out_features, self.module.in_features)

    @property
    def stored(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.module.compute_dtype or x.dtype

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.dense(x.dtype), bias)

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        return x.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantised(self.module.weight, dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        raise TypeError("codes of 4 bits are no dense tensor")


@dataclass(frozen=True)
class Int8Weight:
    """The weight of a bitsandbytes `Linear8bitLt`."""

    module: Any
    kind: Kind = "int8"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.module.out_features, self.module.in_features)

    @property
    def stored(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Let bitsandbytes multiply: it rounds the inputs to 8 bits as well, though not where it trains without a GPU."""
        import bitsandbytes

        self._settle()
        y: Tensor = bitsandbytes.matmul(x, self.module.weight, bias=bias, state=self.module.state)  # type: ignore[attr-defined]
        return y

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        return y.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        self._settle()
        dense: Tensor = int8_vectorwise_dequant(self.module.state.CB, self.module.state.SCB)
        return dense.to(dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        raise TypeError("codes of 8 bits are no dense tensor")

    def _settle(self) -> None:
        """Let the module note its mode, and take its codes up from the checkpoint's form, as its own call would."""
        self.module.state.is_training = self.module.training
        if self.module.weight.CB is not None:
            self.module.init_8bit_state()


def base_weight(module: nn.Module) -> BaseWeight | None:
    """Return the seam over `module`'s weight, or None where it is no linear layer.

    Raises:
        TargetError: a 4-bit layer whose codes bitsandbytes has stored in another layout, or an 8-bit one that keeps none.
    """
    kind = quantised_kind(module)
    if kind == "int8":
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            raise TargetError(
                "an 8-bit layer has has_fp16_weights=True and rounds its weight at every call; load the base with it off"
            )
        return Int8Weight(module)
    if kind is not None:
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise TargetError(
                "a 4-bit layer was stored anew when the base was evaluated; load the base again and adapt it before that"
            )
        return FourBitWeight(module)
    kind_of_module: Any = type(module)
    if isinstance(module, nn.Linear) and is_plain_product(kind_of_module):
        return DenseWeight(module) if type(module) is nn.Linear else SubclassedWeight(module)
    return TransposedWeight(module) if _is_conv1d(module) else None


@cache
def is_plain_product(kind: Any) -> bool:
    """Return whether a class computes what `nn.Linear` does: by its own forward, or as a small instance of it shows."""
    if kind is nn.Linear:
        return True
    if kind.__module__.startswith(
        "torch."
    ):  # such as the projection whose weight nn.MultiheadAttention reads past its forward
        return False
    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            small, x = kind(8, 6, device="cpu", dtype=torch.float32), torch.randn(5, 8)
            found, expected = small(x), F.linear(x, small.weight, small.bias)
    except Exception:  # noqa: BLE001 - its constructor may want anything else, and then it is none
        return False
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and bool((found - expected).abs().max() < 1e-5)
    )


def quantised_kind(module: nn.Module) -> Kind | None:
    """Return how bitsandbytes stores the module's weight, None where it does not; it is not imported for that."""
    if not type(module).__module__.startswith("bitsandbytes"):
        return None
    if type(module).__name__ == "Linear8bitLt":
        return "int8"
    kind = getattr(getattr(module, "weight", None), "quant_type", None)
    return kind if kind in ("nf4", "fp4") else None


def kind_of(model: nn.Module) -> Kind:
    """Return how a model's linear layers are stored: the kind of those that are quantised, or dense where none is."""
    kinds = (quantised_kind(module) for module in model.modules())
    return next((kind for kind in kinds if kind is not None), "dense")


def disable_cpu_repacking(model: nn.Module) -> None:
    """Stop bitsandbytes from storing a 4-bit layer anew, rounded and in another order, when it is first evaluated.

    It does so on processors with AVX512-BF16; the codes would no longer be those that the fingerprint names.
    """
    for module in model.modules():
        if quantised_kind(module) in ("nf4", "fp4"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _is_conv1d(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2
