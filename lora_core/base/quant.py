"""BaseWeight: one interface to the frozen matrix under an adapter, for every kind of storage.

    dense   a `Linear`'s weight (out, in), or a Hugging Face `Conv1D`'s (in, out), transposed
    nf4 fp4 bitsandbytes' `Linear4bit`: 4-bit codes with a scale per block
            (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)
    int8    bitsandbytes' `Linear8bitLt`: 8-bit codes with a scale per row
            (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339)

An adapter needs the base's own product, to the bit, and the dense matrix for its gradients.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base.nf4 import dequantized_weight
from lora_core.errors import TargetError
from lora_core.modules import plain_modules

Kind = Literal["dense", "nf4", "fp4", "int8"]


class BaseWeight(Protocol):
    """A frozen weight W0 of shape (out, in)."""

    @property
    def kind(self) -> Kind: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def stored(self) -> Tensor:
        """The tensor that stores the weight: W0 itself, or its packed codes."""

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype in which the base itself computes on `x`."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W0ᵀ + bias as the base computes it, to the bit, also under autocast."""

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        """Return the dtype of the base's output on `x`, given its product `y`."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W0 as a dense (out, in) tensor of `dtype`."""

    def as_stored(self, weight: Tensor) -> Tensor:
        """Return a dense (out, in) tensor in the orientation of `stored`."""


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
        return loaded(self.module.weight, self.module).to(dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight


@dataclass(frozen=True)
class SubclassedWeight(DenseWeight):
    """The weight of a subclass of `nn.Linear` with a custom forward, such as Falcon's."""

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
        in_features, out_features = self.module.weight.shape
        return (out_features, in_features)

    @property
    def stored(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = loaded(self.module.weight, self.module).to(x.dtype)
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        return y.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        transposed: Tensor = loaded(self.module.weight, self.module).T
        return transposed.to(dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()


@dataclass(frozen=True)
class FourBitWeight:
    """The weight of a bitsandbytes `Linear4bit`, with or without double quantization."""

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
        return dequantized_weight(loaded(self.module.weight, self.module), dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        raise TypeError("4-bit codes are not a dense tensor")


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
        """Let bitsandbytes multiply: except in CPU training, it also rounds inputs to 8 bits."""
        import bitsandbytes

        self._load_codes()
        y: Tensor = bitsandbytes.matmul(x, self.module.weight, bias=bias, state=self.module.state)  # type: ignore[attr-defined]
        return y

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        return y.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        loaded(self.module.weight, self.module)
        self._load_codes()
        dense: Tensor = int8_vectorwise_dequant(self.module.state.CB, self.module.state.SCB)
        return dense.to(dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        raise TypeError("8-bit codes are not a dense tensor")

    def _load_codes(self) -> None:
        """Update the module's mode and load its codes, as its own forward would."""
        self.module.state.is_training = self.module.training
        if self.module.weight.CB is not None:
            self.module.init_8bit_state()


def has_custom_forward(module: nn.Module) -> bool:
    """Return whether the instance has another forward than its class, as offloading installs.

    Its output then is what that forward computes, so it must be called.
    """
    return "forward" in vars(module)


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which `module` computes; an offloaded weight itself is on `meta`."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return weight.device if device is None or not weight.is_meta else torch.device(device)


def loaded(weight: Tensor, module: nn.Module) -> Tensor:
    """Return `weight` of `module` unless accelerate has offloaded it.

    A weight of a model that was built on the meta device, for planning, is returned.

    Raises:
        TargetError: the weight is offloaded, so its values cannot be read.
    """
    if weight.is_meta and has_custom_forward(module):
        raise TargetError(
            f"the weight of a {type(module).__name__} of shape {tuple(weight.shape)} is offloaded, "
            "and only the layer's own forward can read it; load the base without offloading"
        )
    return weight


def base_weight(module: nn.Module) -> BaseWeight | None:
    """Return the interface to `module`'s weight, or None if it is not a linear layer.

    Raises:
        TargetError: a 4-bit layer whose codes bitsandbytes has repacked, or an 8-bit layer that
            does not store its codes.
    """
    kind = quantized_kind(module)
    if kind == "int8":
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            raise TargetError(
                "an 8-bit layer has has_fp16_weights=True and rounds its weight at every call; "
                "load the base with it off"
            )
        return Int8Weight(module)
    if kind is not None:
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise TargetError(
                "a 4-bit layer was repacked when the base was evaluated; load the base again and "
                "adapt it before that"
            )
        return FourBitWeight(module)
    module_type: Any = type(module)
    if isinstance(module, nn.Linear) and computes_linear(module_type):
        return DenseWeight(module) if module_type is nn.Linear else SubclassedWeight(module)
    return TransposedWeight(module) if _is_conv1d(module) else None


def check_computes_linear(module: nn.Module, weight: BaseWeight, name: str) -> None:
    """Refuse a dense layer whose output on a few random rows is not x W0ᵀ + bias.

    An update would be added to something else, and a merge would change the output in another way.
    A class can compute it for some instances only, such as those with a factor of 1.

    Raises:
        TargetError: the output differs.
    """
    is_plain = type(module) is nn.Linear and not has_custom_forward(module)
    if is_plain or weight.kind != "dense" or weight.stored.is_meta:
        return
    try:
        is_product = _matches_product(module, weight.stored, weight.dense(weight.stored.dtype))
    except Exception:  # noqa: BLE001 - a forward with other arguments is not a linear layer's
        is_product = False
    if not is_product:
        raise TargetError(
            f"{name} is a {type(module).__name__} whose output is not the product with its weight "
            "plus its bias, so an update of the weight has no defined meaning; name it in "
            "exclude_modules, or train it in full with modules_to_save"
        )


@torch.no_grad()
def _matches_product(module: nn.Module, stored: Tensor, weight: Tensor) -> bool:
    """Return whether the forward of `module` on random rows is x Wᵀ + bias up to rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=generator).to(stored)
    with torch.random.fork_rng(devices=[]):
        found = module.forward(x)
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    expected = F.linear(x, weight, bias)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    tolerance = torch.finfo(stored.dtype).eps ** 0.5
    error = (found.float() - expected.float()).abs().max()
    return bool(error <= tolerance * expected.float().abs().max().clamp_min(1e-30))


@cache
def computes_linear(module_type: Any) -> bool:
    """Return whether a class computes what `nn.Linear` does.

    It does if it inherits the forward, or if a small instance gives the same output.
    """
    if module_type is nn.Linear:
        return True
    if module_type.__module__.startswith("torch."):
        # For example, nn.MultiheadAttention reads its projection's weight without its forward.
        return False
    if module_type.forward is nn.Linear.forward:
        return True
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            small = module_type(8, 6, device="cpu", dtype=torch.float32)
            return _matches_product(small, small.weight, small.weight)
    except Exception:  # noqa: BLE001 - a constructor with other arguments is not nn.Linear's
        return False


def quantized_kind(module: nn.Module) -> Kind | None:
    """Return how bitsandbytes stores the module's weight, or None; it is not imported for that."""
    if not type(module).__module__.startswith("bitsandbytes"):
        return None
    if type(module).__name__ == "Linear8bitLt":
        return "int8"
    kind = getattr(getattr(module, "weight", None), "quant_type", None)
    return kind if kind in ("nf4", "fp4") else None


def kind_of(model: nn.Module) -> Kind:
    """Return how a model's linear layers are stored: the first quantized kind, or dense."""
    kinds = (quantized_kind(module) for module in model.modules())
    return next((kind for kind in kinds if kind is not None), "dense")


def transposed_modules(model: nn.Module) -> list[str]:
    """Return the paths of the modules of a model, adapted or not, that store (in, out)."""
    return sorted(path for path, module in plain_modules(model).items() if _is_conv1d(module))


def disable_cpu_repacking(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit layers, rounded and reordered, at first evaluation.

    It does so on processors with AVX512-BF16, and then the codes no longer match the fingerprint.
    """
    for module in model.modules():
        if quantized_kind(module) in ("nf4", "fp4"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _is_conv1d(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2
