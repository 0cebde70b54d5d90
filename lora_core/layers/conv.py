"""LoraConv2d: a convolution with a low-rank update: A looks at the image, B mixes what A saw.

    y = conv(x, W0) + bias + s · conv₁ₓ₁(conv(dropout(x), A), B)

Shapes: W0 (O, I/groups, kh, kw), A (R, I/groups, kh, kw), B (O, R, 1, 1). Seen as matrices, ΔW = s · B A as for a linear
layer. A grouped convolution is refused: its update would need an A for each group.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.config import LoraConfig
from lora_core.errors import MergeError, TargetError
from lora_core.layers.dora import row_norms, squared_row_norms
from lora_core.layers.functional import dense_update
from lora_core.layers.linear import start
from lora_core.targets import Target


class LoraConv2d(nn.Module):
    """An update over a frozen convolution.

    Attributes:
        lora_A: (r, in, kh, kw), trained.
        lora_B: (out, r, 1, 1), trained; zero at the start.
        lora_bias: (out,), trained, inside the scale; None where the config has none.
        magnitude: (1, out, 1, 1), under DoRA.
    """

    row_squares: Tensor | None

    def __init__(self, base: nn.Conv2d, target: Target, config: LoraConfig) -> None:
        """Build an update of zero over `base`; `reset` fills it.

        Raises:
            TargetError: the convolution is grouped, or pads in a way an update cannot repeat.
        """
        super().__init__()
        if base.groups != 1 or base.padding_mode != "zeros":
            raise TargetError(
                f"{target.name} has groups={base.groups} and padding_mode={base.padding_mode!r}; only convolutions of one group "
                "with zeros around are adapted, so leave it out of target_modules"
            )
        out, device = base.out_channels, base.weight.device
        self.base = base
        self.scale = target.scale
        self.dropout = config.lora_dropout
        self.lora_A = nn.Parameter(torch.zeros(target.rank, *base.weight.shape[1:], device=device))
        self.lora_B = nn.Parameter(torch.zeros(out, target.rank, 1, 1, device=device))
        self.lora_bias = nn.Parameter(torch.zeros(out, device=device)) if config.lora_bias else None
        self.trained_bias = (
            None
            if base.bias is None or config.bias == "none"
            else nn.Parameter(base.bias.detach().clone())
        )
        self.magnitude = (
            nn.Parameter(torch.zeros(1, out, 1, 1, device=device)) if config.use_dora else None
        )
        self.register_buffer(
            "row_squares",
            torch.zeros(out, device=device) if config.use_dora else None,
            persistent=False,
        )

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw A anew and let B·A be zero: the layer is its base again."""
        start(*self._factors(), name, config, seed)
        if self.lora_bias is not None:
            self.lora_bias.zero_()
        if self.magnitude is not None and self.row_squares is not None:
            self.row_squares.copy_(squared_row_norms(self._weight()))
            self.magnitude.copy_(self.row_squares.sqrt().view_as(self.magnitude))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H', W')."""
        conv = self._base()
        y = F.conv2d(
            x,
            conv.weight,
            None if self.magnitude is not None else self.bias,
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        seen = F.conv2d(
            F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype),
            self.lora_A,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        update = F.conv2d(seen, self.lora_B, self.lora_bias) * self.scale
        y = y + update.to(y.dtype)
        if self.magnitude is None:
            return y
        y = y * self._row_factors().view_as(self.magnitude).to(y.dtype)
        return y if self.bias is None else y + self.bias[None, :, None, None].to(y.dtype)

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

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW as a matrix, (out, in·kh·kw) in float32; of DoRA, what its rows' lengths change as well."""
        change = dense_update(*self._factors(), self.scale)
        if self.magnitude is None:
            return change
        return self._row_factors()[:, None] * (self._weight() + change) - self._weight()

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the kernel with the update in it, in float32, and the bias where it is trained."""
        merged = {"weight": (self._weight() + self.delta()).view(self._base().weight.shape)}
        bias = self._merged_bias()
        return merged if bias is None else {**merged, "bias": bias}

    @property
    def weight(self) -> Tensor:
        """The base's kernel."""
        return self._base().weight

    @property
    def bias(self) -> Tensor | None:
        trained: nn.Parameter | None = self._parameters.get("trained_bias")
        return self._base().bias if trained is None else trained

    def _merged_bias(self) -> Tensor | None:
        if self.lora_bias is None:
            return self.trained_bias
        if self.bias is None:
            raise MergeError(
                "lora_bias=True gives a bias to a convolution that has none; export the adapter unmerged"
            )
        return self.bias.float() + self.scale * self.lora_bias

    def _row_factors(self) -> Tensor:
        assert self.magnitude is not None and self.row_squares is not None
        return self.magnitude.flatten() / row_norms(
            self._weight(), self.row_squares, *self._factors(), self.scale
        )

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B as matrices, (r, in·kh·kw) and (out, r), over the same memory."""
        return self.lora_A.flatten(1), self.lora_B.flatten(1)

    def _weight(self) -> Tensor:
        return self._base().weight.flatten(1).float()

    def _base(self) -> nn.Conv2d:
        assert isinstance(self.base, nn.Conv2d)
        return self.base
