"""LoraLinear: a linear layer in any storage, plus a trained low-rank update.

It wraps the layer instead of inheriting from it, so the base keeps its type, its storage and its
bits. Every layer of an adapter, in this package and elsewhere, implements `AdapterPart`.

Some models read a layer's weight instead of calling the layer, such as fused kernels. They get the
effective weight, W0 + ΔW, and its gradient reaches A and B.
"""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lora_core.base.quant import (
    BaseWeight,
    base_weight,
    execution_device,
    has_custom_forward,
    loaded,
)
from lora_core.config import LoraConfig
from lora_core.errors import MergeError
from lora_core.init.random import generator_for, initial_a, orthogonal
from lora_core.init.spectral import is_spectral, plain_pair, spectral_init
from lora_core.layers.dora import row_norms, squared_row_norms
from lora_core.layers.functional import ScaledFactors, add_update, dense_update, lora_linear
from lora_core.modules import base_attribute
from lora_core.targets import Target


@runtime_checkable
class AdapterPart(Protocol):
    """A module that replaces a module of the model while the model is adapted."""

    base: nn.Module
    """The module of the model, frozen."""

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return what is trained and saved, under PEFT's names relative to the module's path."""

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the base's parameters with the training merged in, in the base's layout."""


@runtime_checkable
class LoraLayer(AdapterPart, Protocol):
    """A part that adds a low-rank update to a weight."""

    scale: float
    """Factor of B·A."""

    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Initialize again: the layer computes what its base computes."""

    def delta(self) -> Tensor:
        """Return ΔW as a matrix, (out, in) in float32."""


class LoraLinear(nn.Module):
    """y = x W0ᵀ + bias + s · dropout(x) Aᵀ Bᵀ over a frozen `base`; DoRA rescales the rows.

    Attributes:
        lora_A: (r, in), trained.
        lora_B: (out, r), trained; initialized to zero.
        scale: the factor of B·A.
        lora_bias: (out,), trained, inside the scale; None if the config has none.
        init_A, init_B: the frozen initial factors, which a spectral init subtracts; otherwise None.
        trained_bias: (out,), replaces the base's bias; None if the config does not train it.
        magnitude: (out,), the norm of each row under DoRA; otherwise None.
    """

    row_squares: Tensor | None
    init_A: Tensor | None
    init_B: Tensor | None
    returns_product_dtype = False
    """Whether the output has the dtype of the product even if the base returns its input's; see
    `keep_product_dtype`."""

    def __init__(self, base: nn.Module, target: Target, config: LoraConfig) -> None:
        """Build a zero update over `base`, on its device; `reset` initializes A."""
        super().__init__()
        weight = base_weight(base)
        assert weight is not None, target.name
        out_features, in_features = weight.shape
        device = execution_device(base)
        self.base = base
        self._frozen = (base, weight)
        self.scale = target.scale
        self.dropout = config.lora_dropout
        self.lora_A = _zeros(target.rank, in_features, device=device)
        self.lora_B = _zeros(out_features, target.rank, device=device)
        self.register_buffer("init_A", None)
        self.register_buffer("init_B", None)
        self.lora_bias = _zeros(out_features, device=device) if config.lora_bias else None
        self.trained_bias = None
        bias = self.plain_bias
        if bias is not None and config.bias != "none":
            self.trained_bias = nn.Parameter(loaded(bias, base).detach().clone())
        self.magnitude = _zeros(out_features, device=device) if config.use_dora else None
        squares = torch.zeros(out_features, device=device) if config.use_dora else None
        self.register_buffer("row_squares", squares, persistent=False)

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw A again for the target `name` and make B·A zero: the layer equals its base."""
        if is_spectral(config.init_lora_weights):
            self._init_from_weight(name, config, seed)
        else:
            init_factors(self.lora_A, self.lora_B, name=name, config=config, seed=seed)
        if self.lora_bias is not None:
            self.lora_bias.zero_()
        if self.magnitude is not None and self.row_squares is not None:
            self.row_squares.copy_(squared_row_norms(self.frozen.dense(torch.float32)))
            self.magnitude.copy_(self.row_squares.sqrt())

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        if has_custom_forward(self.base):
            return self._forward_over_custom(input)
        frozen = self.frozen
        dtype = frozen.compute_dtype(input)
        bias = self.plain_bias
        bias = None if bias is None else bias.to(dtype)
        y = lora_linear(
            input,
            frozen,
            bias=None if self._has_extras else bias,
            update=self._update(),
            dropout=self._dropout_now(),
            dtype=dtype,
        )
        if self._has_extras:
            y = self.add_extras(y, bias)
        return y if self.returns_product_dtype else y.to(frozen.output_dtype(input, y))

    @property
    def frozen(self) -> BaseWeight:
        """The weight of `base`, also where the base was replaced, as in a replica."""
        base, weight = self._frozen
        if base is not self.base:
            weight = _weight_of(self.base, type(base), weight)
            self._frozen = (self.base, weight)
        return weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the complete update.

        After a spectral init this is the trained pair minus the initial pair, of twice the rank.
        """
        if self.init_A is None or self.init_B is None:
            return self.lora_A, self.lora_B
        return plain_pair(self.lora_A, self.lora_B, self.init_A, self.init_B)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return what is trained and saved, under PEFT's names relative to the module's path."""
        tensors = {
            "lora_A.weight": self.lora_A,
            "lora_B.weight": self.lora_B,
            "lora_B.bias": self.lora_bias,
            "base_layer.bias": self.trained_bias,
            "lora_magnitude_vector": self.magnitude,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def is_plain(self) -> bool:
        """Whether the layer only adds s · B A to a frozen layer, which one function can do."""
        return not self._has_extras and self.init_A is None

    @property
    def _has_extras(self) -> bool:
        extras = (self.lora_bias, self.trained_bias, self.magnitude)
        return any(extra is not None for extra in extras)

    @property
    def plain_bias(self) -> Tensor | None:
        """The base's bias, or the trained one that replaces it; without lora_bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        trained: Tensor | None = self.trained_bias  # a tensor in a replica of DataParallel
        return bias if trained is None else trained

    @property
    def bias(self) -> Tensor | None:
        """The effective bias, for models that read it instead of calling the layer."""
        bias = self.plain_bias
        if self.lora_bias is None:
            return bias
        update = self.scale * self.lora_bias
        return update if bias is None else bias + update.to(bias.dtype)

    @property
    def weight(self) -> Tensor:
        """The effective weight W0 + ΔW, laid out as the base stores it; without dropout.

        A quantized or offloaded weight is returned as it is stored, because no dense sum replaces
        it; so is one that ZeRO has divided among processes.
        """
        frozen = self.frozen
        stored = frozen.stored
        is_absent = stored.is_meta or not stored.numel()
        if frozen.kind != "dense" or is_absent:
            return stored
        dtype = torch.promote_types(stored.dtype, torch.float32)
        effective = frozen.dense(dtype) + dense_update(*self.factors(), self.scale, dtype)
        if self.magnitude is not None:
            effective = self._row_factors()[:, None] * effective
        return frozen.as_stored(effective.to(stored.dtype))

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW = s · B A, (out, in) in float32; under DoRA with the change of row norms."""
        change = dense_update(*self.factors(), self.scale)
        if self.magnitude is None:
            return change
        weight = self.frozen.dense(torch.float32)
        return self._row_factors()[:, None] * (weight + change) - weight

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the weight with the update, in float32, and the bias if it is trained."""
        total = self.frozen.dense(torch.float32) + self.delta()
        merged = {"weight": self.frozen.as_stored(total)}
        bias = self.merged_bias()
        return merged if bias is None else {**merged, "bias": bias}

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """Return the bias that a plain layer needs; None if the base's bias does not change."""
        if self.lora_bias is None:
            return self.trained_bias
        bias = self.plain_bias
        if bias is None:
            raise MergeError(
                "lora_bias=True gives a bias to a layer that has none; export the adapter unmerged"
            )
        return bias.float() + self.scale * self.lora_bias

    def add_extras(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Apply to the product what the layer computes in addition to s · B A."""
        if self.magnitude is not None:
            y = y * self._row_factors().to(y.dtype)
        if self.lora_bias is not None:
            y = y + (self.scale * self.lora_bias).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _forward_over_custom(self, x: Tensor) -> Tensor:
        """Add the update to what a base with a custom forward computes, such as an offloaded one.

        The base's bias is in its output, so what replaces or rescales it subtracts it first.
        """
        y: Tensor = self.base(x)
        replaces_bias = self.magnitude is not None or self.trained_bias is not None
        bias: Tensor | None = self.base.bias if replaces_bias else None  # type: ignore[assignment]
        if bias is not None:
            y = y - loaded(bias, self.base).to(y.dtype)
        y = add_update(y, x, self._update(), dropout=self._dropout_now())
        return self.add_extras(y, self.plain_bias if replaces_bias else None)

    def _update(self) -> ScaledFactors:
        return ScaledFactors(*self.factors(), self.scale)

    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0

    def _row_factors(self) -> Tensor:
        """Return m / ‖W0 + s·B A‖, (out,); only m gets a gradient."""
        assert self.magnitude is not None and self.row_squares is not None
        weight = self.frozen.dense(torch.float32)
        return self.magnitude / row_norms(weight, self.row_squares, *self.factors(), self.scale)

    def _init_from_weight(self, name: str, config: LoraConfig, seed: int) -> None:
        """Initialize A and B from the weight and keep that pair: every product subtracts it."""
        a, b = spectral_init(
            self.frozen.dense(torch.float32),
            self.lora_A.shape[0],
            self.scale,
            config.init_lora_weights,
            generator_for(name, seed),
        )
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.init_A = self.lora_A.detach().clone()
        self.init_B = self.lora_B.detach().clone()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return base_attribute(self, name)

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, base={self.frozen.kind}"


def keep_product_dtype(model: nn.Module) -> None:
    """Let each adapted layer return the dtype in which it multiplies, for a training.

    bitsandbytes' 4-bit layers multiply float32 inputs in their `compute_dtype` and return float32.
    Under autocast any other layer returns the dtype of its product, and so do these from now on:
    the activations between layers take half the memory.

    Args:
        model: with an adapter; trained and called under autocast.
    """
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.returns_product_dtype = True


@torch.no_grad()
def init_factors(a: Tensor, b: Tensor, *, name: str, config: LoraConfig, seed: int) -> None:
    """Fill A (r, in) and B (out, r) with the initialization that the config names.

    Both may be views of the trained tensors.
    """
    rank, in_features = a.shape
    method = config.init_lora_weights
    generator = generator_for(name, seed)
    if method == "orthogonal":
        orthogonal_a, orthogonal_b = orthogonal(rank, (b.shape[0], in_features), generator)
        a.copy_(orthogonal_a)
        b.copy_(orthogonal_b)
        return
    a.copy_(initial_a(rank, in_features, method, generator))
    b.zero_()


def _weight_of(base: nn.Module, former_type: type[nn.Module], former: Any) -> BaseWeight:
    """Return the weight of a base that takes the place of one of `former_type`.

    A replica of DataParallel has tensors instead of parameters, so its type is not decided again.
    """
    if type(base) is former_type:
        replaced: BaseWeight = replace(former, module=base)
        return replaced
    weight = base_weight(base)
    assert weight is not None, type(base)
    return weight


def _zeros(*shape: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32))
