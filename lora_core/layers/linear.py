"""LoraLinear: a linear layer, however it is stored, with a trained low-rank update beside it.

It wraps the layer instead of inheriting from it, so the base keeps its type, its storage and its bits. Every layer of an
adapter, here and in the rooms beside, answers to `AdapterPart`.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lora_core.base.quant import base_weight
from lora_core.config import LoraConfig
from lora_core.errors import MergeError
from lora_core.init.random import generator_for, initial_a, orthogonal
from lora_core.init.spectral import is_spectral, plain_pair, spectral_start
from lora_core.layers.dora import row_norms, squared_row_norms
from lora_core.layers.functional import dense_update, lora_linear
from lora_core.targets import Target


@runtime_checkable
class AdapterPart(Protocol):
    """What stands in the model in a module's place while it is adapted."""

    base: nn.Module
    """The module of the model, frozen."""

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """What is trained and saved, under PEFT's names after the module's path."""

    def merged_tensors(self) -> dict[str, Tensor]:
        """The base's parameters with the training in them, by name, laid out as the base stores them."""


@runtime_checkable
class LoraLayer(AdapterPart, Protocol):
    """A part that adds a low-rank update to a weight."""

    scale: float
    """Factor of B·A."""

    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw the start anew: the layer is its base again."""

    def delta(self) -> Tensor:
        """ΔW as a matrix, (out, in) in float32."""


class LoraLinear(nn.Module):
    """y = x W0ᵀ + bias + s · dropout(x) Aᵀ Bᵀ over a frozen `base` module; rows rescaled under DoRA.

    Attributes:
        lora_A: (r, in), trained.
        lora_B: (out, r), trained; zero at the start.
        scale: the factor of B·A.
        lora_bias: (out,), trained, inside the scale; None where the config has none.
        init_A, start_B: the frozen start that a spectral init takes off again; None for the others.
        trained_bias: (out,), in the place of the base's bias; None where the config leaves that alone.
        magnitude: (out,), the length of each row under DoRA; None without.
    """

    row_squares: Tensor | None
    init_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, base: nn.Module, target: Target, config: LoraConfig) -> None:
        """Build an update of zero over `base`, on its device; A is still empty, `reset` fills it."""
        super().__init__()
        weight = base_weight(base)
        assert weight is not None, target.name
        (out_features, in_features), device = weight.shape, weight.stored.device
        self.base = base
        self.frozen = weight
        self.scale = target.scale
        self.dropout = config.lora_dropout
        self.lora_A = _empty(target.rank, in_features, device=device)
        self.lora_B = _empty(out_features, target.rank, device=device)
        self.register_buffer("init_A", None)
        self.register_buffer("start_B", None)
        self.lora_bias = _empty(out_features, device=device) if config.lora_bias else None
        self.trained_bias = (
            None
            if self.bias is None or config.bias == "none"
            else nn.Parameter(self.bias.detach().clone())
        )
        self.magnitude = _empty(out_features, device=device) if config.use_dora else None
        self.register_buffer(
            "row_squares",
            torch.zeros(out_features, device=device) if config.use_dora else None,
            persistent=False,
        )

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw A anew for the target `name` and let B·A be zero: the layer is its base again."""
        if is_spectral(config.init_lora_weights):
            self._start_from_weight(name, config, seed)
        else:
            start(self.lora_A, self.lora_B, name, config, seed)
        if self.lora_bias is not None:
            self.lora_bias.zero_()
        if self.magnitude is not None and self.row_squares is not None:
            self.row_squares.copy_(squared_row_norms(self.frozen.dense(torch.float32)))
            self.magnitude.copy_(self.row_squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        dropout = self.dropout if self.training else 0.0
        dtype = self.frozen.compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        inside = None if self._is_finished_apart else bias
        y = lora_linear(x.to(dtype), self.frozen, inside, (*self.factors(), self.scale), dropout)
        if self._is_finished_apart:
            y = self.finished(y, bias)
        return y.to(self.frozen.output_dtype(x, y))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the whole update: of a spectral start the trained pair less the start, of twice the rank."""
        if self.init_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return plain_pair(self.lora_A, self.lora_B, self.init_A, self.start_B)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """What is trained and saved, under PEFT's names after the module's path."""
        tensors = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        optional = {
            "lora_B.bias": self.lora_bias,
            "base_layer.bias": self.trained_bias,
            "lora_magnitude_vector": self.magnitude,
        }
        return tensors | {
            name: parameter for name, parameter in optional.items() if parameter is not None
        }

    @property
    def is_plain(self) -> bool:
        """Whether the layer adds s · B A to a frozen layer and nothing more, so that all is done in one function."""
        return (
            self.lora_bias is None
            and self.trained_bias is None
            and self.magnitude is None
            and self.init_A is None
        )

    @property
    def _is_finished_apart(self) -> bool:
        return (
            self.lora_bias is not None
            or self.trained_bias is not None
            or self.magnitude is not None
        )

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        trained: nn.Parameter | None = self._parameters.get("trained_bias")
        return bias if trained is None else trained

    @property
    def weight(self) -> Tensor:
        """The base's stored weight, for models that look at its dtype or device."""
        return self.frozen.stored

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW = s · B A, (out, in), in float32; of DoRA, what its rows' lengths change as well."""
        change = dense_update(*self.factors(), self.scale)
        if self.magnitude is None:
            return change
        weight = self.frozen.dense(torch.float32)
        return self._row_factors()[:, None] * (weight + change) - weight

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the weight with the update in it, in float32, and the bias where it is trained."""
        merged = {"weight": self.frozen.as_stored(self.frozen.dense(torch.float32) + self.delta())}
        bias = self.merged_bias()
        return merged if bias is None else {**merged, "bias": bias}

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """Return the bias that a plain layer would need; None where the base's own stays."""
        if self.trained_bias is None and self.lora_bias is None:
            return None
        if self.lora_bias is None:
            return self.trained_bias
        own = self.bias
        if own is None:
            raise MergeError(
                "lora_bias=True gives a bias to a layer that has none; export the adapter unmerged"
            )
        return own.float() + self.scale * self.lora_bias

    def finished(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Put on the product what is more than s · B A."""
        if self.magnitude is not None:
            y = y * self._row_factors().to(y.dtype)
        if self.lora_bias is not None:
            y = y + (self.scale * self.lora_bias).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _row_factors(self) -> Tensor:
        """Return m / ‖W0 + s·B A‖, (out,); only m gets a gradient."""
        assert self.magnitude is not None and self.row_squares is not None
        weight = self.frozen.dense(torch.float32)
        return self.magnitude / row_norms(weight, self.row_squares, *self.factors(), self.scale)

    def _start_from_weight(self, name: str, config: LoraConfig, seed: int) -> None:
        """Start A and B from the weight itself, and keep that start, which is taken off again in every product."""
        weight, rank = self.frozen.dense(torch.float32), self.lora_A.shape[0]
        a, b = spectral_start(
            weight, (rank, self.scale), config.init_lora_weights, generator_for(name, seed)
        )
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.init_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, base={self.frozen.kind}"


@torch.no_grad()
def start(a: Tensor, b: Tensor, name: str, config: LoraConfig, seed: int) -> None:
    """Fill A (r, in) and B (out, r) with the start that the config names; both may be seen through a reshape."""
    rank, in_features = a.shape
    generator = generator_for(name, seed)
    if config.init_lora_weights == "orthogonal":
        first, second = orthogonal(rank, (b.shape[0], in_features), generator)
        a.copy_(first)
        b.copy_(second)
        return
    a.copy_(initial_a(rank, in_features, config.init_lora_weights, generator))
    b.zero_()


def _empty(*shape: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32))
