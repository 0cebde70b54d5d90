"""LoraConv2d: a convolution with a low-rank update. A convolves the input, B mixes A's channels.

    y = conv(x, W0) + bias + s · conv₁ₓ₁(conv(dropout(x), A), B)

Shapes: W0 (O, I/groups, kh, kw), A (R, I/groups, kh, kw), B (O, R, 1, 1). As matrices, ΔW = s · B A
as for a linear layer. Grouped convolutions are refused: the update would need one A per group.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base.quant import execution_device, has_custom_forward, loaded
from lora_core.config import LoraConfig
from lora_core.errors import MergeError, TargetError
from lora_core.layers.dora import row_norms, squared_row_norms
from lora_core.layers.functional import dense_update
from lora_core.layers.linear import init_factors
from lora_core.modules import base_attribute
from lora_core.targets import Target


class LoraConv2d(nn.Module):
    """An update over a frozen convolution.

    Attributes:
        lora_A: (r, in, kh, kw), trained.
        lora_B: (out, r, 1, 1), trained; initialized to zero.
        lora_bias: (out,), trained, inside the scale; None if the config has none.
        magnitude: (1, out, 1, 1), under DoRA.
    """

    row_squares: Tensor | None

    def __init__(self, base: nn.Conv2d, target: Target, config: LoraConfig) -> None:
        """Build a zero update over `base`; `reset` initializes it.

        Raises:
            TargetError: the convolution is grouped, or pads in a way an update cannot repeat.
        """
        super().__init__()
        if base.groups != 1 or base.padding_mode != "zeros":
            raise TargetError(
                f"{target.name} has groups={base.groups} and padding_mode={base.padding_mode!r}; "
                "only ungrouped convolutions with zero padding are adapted, "
                "so leave it out of target_modules"
            )
        out = base.out_channels
        device = execution_device(base)
        self.base = base
        self.scale = target.scale
        self.dropout = config.lora_dropout
        self.lora_A = _zeros(target.rank, *base.weight.shape[1:], device=device)
        self.lora_B = _zeros(out, target.rank, 1, 1, device=device)
        self.lora_bias = _zeros(out, device=device) if config.lora_bias else None
        self.trained_bias = None
        if base.bias is not None and config.bias != "none":
            self.trained_bias = nn.Parameter(loaded(base.bias, base).detach().clone())
        self.magnitude = _zeros(1, out, 1, 1, device=device) if config.use_dora else None
        squares = torch.zeros(out, device=device) if config.use_dora else None
        self.register_buffer("row_squares", squares, persistent=False)

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw A again and make B·A zero: the layer equals its base."""
        init_factors(*self._factors(), name=name, config=config, seed=seed)
        if self.lora_bias is not None:
            self.lora_bias.zero_()
        if self.magnitude is not None and self.row_squares is not None:
            self.row_squares.copy_(squared_row_norms(self._weight()))
            self.magnitude.copy_(self.row_squares.sqrt().view_as(self.magnitude))

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H', W')."""
        y = self._base_product(input)
        dropped = F.dropout(input, self.dropout, self.training).to(y.device, self.lora_A.dtype)
        down = self._convolve(dropped, self.lora_A, None)
        update = F.conv2d(down, self.lora_B, self.lora_bias) * self.scale
        y = y + update.to(y.dtype)
        if self.magnitude is None:
            return y
        y = y * self._row_factors().view_as(self.magnitude).to(y.dtype)
        bias = self.plain_bias
        return y if bias is None else y + bias[None, :, None, None].to(y.dtype)

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

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW, (out, in·kh·kw) in float32; under DoRA with the change of row norms."""
        change = dense_update(*self._factors(), self.scale)
        if self.magnitude is None:
            return change
        return self._row_factors()[:, None] * (self._weight() + change) - self._weight()

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the kernel with the update, in float32, and the bias if it is trained."""
        total = self._weight() + self.delta()
        merged = {"weight": total.view(self._base().weight.shape)}
        bias = self._merged_bias()
        return merged if bias is None else {**merged, "bias": bias}

    @property
    def weight(self) -> Tensor:
        """The effective kernel, for models that read it; the stored one if it is offloaded."""
        stored = self._base().weight
        if stored.is_meta or not stored.numel():
            return stored
        dtype = torch.promote_types(stored.dtype, torch.float32)
        effective = stored.flatten(1).to(dtype) + dense_update(*self._factors(), self.scale, dtype)
        if self.magnitude is not None:
            effective = self._row_factors()[:, None] * effective
        return effective.view(stored.shape).to(stored.dtype)

    @property
    def plain_bias(self) -> Tensor | None:
        """The base's bias, or the trained one that replaces it; without lora_bias."""
        trained: Tensor | None = self.trained_bias  # a tensor in a replica of DataParallel
        return self._base().bias if trained is None else trained

    @property
    def bias(self) -> Tensor | None:
        """The effective bias, for models that read it instead of calling the layer."""
        bias = self.plain_bias
        if self.lora_bias is None:
            return bias
        update = self.scale * self.lora_bias
        return update if bias is None else bias + update.to(bias.dtype)

    def _base_product(self, x: Tensor) -> Tensor:
        """Return what the base computes, without the bias under DoRA, which adds it last."""
        base = self._base()
        bias = self.plain_bias if self.magnitude is None else None
        if not has_custom_forward(base):
            return self._convolve(x, base.weight, bias)
        y: Tensor = base(x)
        if base.bias is not None and bias is not base.bias:
            y = y - loaded(base.bias, base)[:, None, None].to(y.dtype)
        if bias is not None and bias is not base.bias:
            y = y + bias[:, None, None].to(y.dtype)
        return y

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with the stride, padding and dilation of the base."""
        base = self._base()
        return F.conv2d(x, kernel, bias, base.stride, base.padding, base.dilation)

    def _merged_bias(self) -> Tensor | None:
        if self.lora_bias is None:
            return self.trained_bias
        bias = self.plain_bias
        if bias is None:
            raise MergeError(
                "lora_bias=True gives a bias to a convolution that has none; "
                "export the adapter unmerged"
            )
        return bias.float() + self.scale * self.lora_bias

    def _row_factors(self) -> Tensor:
        assert self.magnitude is not None and self.row_squares is not None
        norms = row_norms(self._weight(), self.row_squares, *self._factors(), self.scale)
        return self.magnitude.flatten() / norms

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B as matrices, (r, in·kh·kw) and (out, r), over the same memory."""
        return self.lora_A.flatten(1), self.lora_B.flatten(1)

    def _weight(self) -> Tensor:
        return loaded(self._base().weight, self._base()).flatten(1).float()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return base_attribute(self, name)

    def _base(self) -> nn.Conv2d:
        assert isinstance(self.base, nn.Conv2d)
        return self.base


def _zeros(*shape: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device))
