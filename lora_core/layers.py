"""LoraLinear: a linear layer, dense or 4-bit, with a trained low-rank update beside it.

It wraps the layer instead of inheriting from it, so the base keeps its type, its storage and its bits.
"""

import torch
from torch import Tensor, nn

from lora_core.config import LoraConfig
from lora_core.functional import lora_linear
from lora_core.init import generator_for, initial_a
from lora_core.quant import BaseWeight


class LoraLinear(nn.Module):
    """y = x W0ᵀ + bias + s · dropout(x) Aᵀ Bᵀ over a frozen `base` module.

    Attributes:
        lora_A: (r, in), trained.
        lora_B: (out, r), trained; zero at the start.
        scale: the factor of B·A.
    """

    def __init__(self, base: nn.Module, weight: BaseWeight, config: LoraConfig) -> None:
        """Build an update of zero over `base`, on its device; A is still empty, `reset` fills it."""
        super().__init__()
        out_features, in_features = weight.shape
        device = weight.stored.device
        self.base = base
        self.frozen = weight
        self.scale = config.scale
        self.dropout = config.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r, device=device, dtype=torch.float32))

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw A anew for the target `name` and set B to zero: the layer is its base again."""
        rank, in_features = self.lora_A.shape
        self.lora_A.copy_(initial_a(rank, in_features, config.init_lora_weights, generator_for(name, seed)))
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        dropout = self.dropout if self.training else 0.0
        dtype = self.frozen.compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return lora_linear(x.to(dtype), self.frozen, bias, (self.lora_A, self.lora_B, self.scale), dropout).to(x.dtype)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW = s · B A, (out, in), in float32."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, base={self.frozen.kind}"
