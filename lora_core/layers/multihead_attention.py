"""LoraAttention: `nn.MultiheadAttention` with low-rank updates of both of its projections.

    W_in' = W_in + s · B A         W_in (3E, E): query, key and value
    W_out' = W_out + 2 s · B_o A_o  W_out (E, E)

The module passes its weights to one function and calls no layer, so it computes with the sums, as
in PEFT. There is no dropout: inputs of the output projection exist only inside that function.
PEFT (0.21) adds the update of the output projection twice, so its files mean that, and so do these.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_core.base.quant import has_custom_forward
from lora_core.config import LoraConfig
from lora_core.errors import TargetError
from lora_core.layers.functional import ScaledFactors, dense_update
from lora_core.layers.linear import init_factors
from lora_core.modules import base_attribute
from lora_core.targets import Target

SAME_SIZES = "_qkv_same_embed_dim"
"""Private attribute that `nn.TransformerEncoderLayer` reads too."""

OUT_FACTOR = 2
"""How often the update of the output projection is added."""


class Projection(NamedTuple):
    """What parents read of the output projection."""

    weight: Tensor
    bias: Tensor | None


class LoraAttention(nn.Module):
    """A frozen attention module `base` that computes with updated projections.

    Attributes:
        lora_A, lora_B: (r, E) and (3E, r), of the input projection, trained; B starts at zero.
        out_A, out_B: (r, E) and (E, r), of the output projection, trained; B starts at zero.
        scale: s.
    """

    def __init__(self, base: nn.MultiheadAttention, target: Target, config: LoraConfig) -> None:
        """Build zero updates over `base`; `reset` initializes A.

        Raises:
            TargetError: the module has separate projections, or the config sets what is not
                supported here.
        """
        super().__init__()
        _refuse_unsupported(base, target.name, config)
        width = base.embed_dim
        device = base.in_proj_weight.device
        self.base = base
        self.scale = target.scale
        self.lora_A = nn.Parameter(torch.zeros(target.rank, width, device=device))
        self.lora_B = nn.Parameter(torch.zeros(3 * width, target.rank, device=device))
        self.out_A = nn.Parameter(torch.zeros(target.rank, width, device=device))
        self.out_B = nn.Parameter(torch.zeros(width, target.rank, device=device))

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw both A again for the module `name` and zero both B: the layer equals its base."""
        init_factors(self.lora_A, self.lora_B, name=name, config=config, seed=seed)
        out = f"{name}.out_proj"
        init_factors(self.out_A, self.out_B, name=out, config=config, seed=seed)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the base computes with the updated projections."""
        effective = {
            "in_proj_weight": self.in_proj_weight,
            "out_proj.weight": self.out_proj.weight,
        }
        return functional_call(self.base, effective, arguments, options)

    @property
    def in_proj_weight(self) -> Tensor:
        """The updated input projection, (3E, E), through which A and B get their gradient."""
        return self._updated_input(self._base().in_proj_weight)

    @property
    def in_proj_bias(self) -> Tensor | None:
        bias: Tensor | None = self._base().in_proj_bias
        return bias

    @property
    def out_proj(self) -> Projection:
        """The updated output projection, for parents that read it."""
        stored = self._base().out_proj
        return Projection(self._updated_output(stored.weight), stored.bias)

    def merge_masks(self, *arguments: Any, **options: Any) -> Any:
        """Merge masks as the base does, which uses no weight."""
        return self._base().merge_masks(*arguments, **options)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return what is trained and saved, under PEFT's names relative to the module's path."""
        return {
            "lora_A.weight": self.lora_A,
            "lora_B.weight": self.lora_B,
            "base_layer.out_proj.lora_A.weight": self.out_A,
            "base_layer.out_proj.lora_B.weight": self.out_B,
        }

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return both projections with their updates, in float32."""
        base = self._base()
        return {
            "in_proj_weight": self._updated_input(base.in_proj_weight.float()),
            "out_proj.weight": self._updated_output(base.out_proj.weight.float()),
        }

    def _updated_input(self, stored: Tensor) -> Tensor:
        return _sum(stored, ScaledFactors(self.lora_A, self.lora_B, self.scale))

    def _updated_output(self, stored: Tensor) -> Tensor:
        return _sum(stored, ScaledFactors(self.out_A, self.out_B, OUT_FACTOR * self.scale))

    def _base(self) -> nn.MultiheadAttention:
        assert isinstance(self.base, nn.MultiheadAttention)
        return self.base

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == SAME_SIZES:
                return True
            return base_attribute(self, name)


def _sum(stored: Tensor, update: ScaledFactors) -> Tensor:
    """Return W + s · B A in the dtype of W, added in float32 or wider."""
    dtype = torch.promote_types(stored.dtype, torch.float32)
    total = stored.detach().to(dtype) + dense_update(*update, dtype)
    return total.to(stored.dtype)


def is_attention(module: nn.Module) -> bool:
    """Return whether `module` is PyTorch's attention, with PyTorch's forward."""
    is_kind = isinstance(module, nn.MultiheadAttention)
    return is_kind and type(module).forward is nn.MultiheadAttention.forward


def _refuse_unsupported(base: nn.MultiheadAttention, name: str, config: LoraConfig) -> None:
    """Raise for what PEFT does not adapt either, or would ignore."""
    if not getattr(base, SAME_SIZES):
        raise TargetError(
            f"{name} has separate projections of query, key and value (kdim={base.kdim}, "
            f"vdim={base.vdim}), which are not adapted; leave it out of target_modules"
        )
    if has_custom_forward(base):
        raise TargetError(
            f"{name} is offloaded, and attention needs its weights; load it without offloading"
        )
    settings = {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "bias": config.bias != "none",
    }
    for setting, is_set in settings.items():
        if is_set:
            raise TargetError(
                f"{setting}={getattr(config, setting)!r} is not supported by {name}, an "
                "nn.MultiheadAttention; disable it, or leave the module out of target_modules"
            )
