"""LoraConv: a convolution with a low-rank update. A convolves the input, B mixes A's channels.

    y = conv(x, W0) + bias + s · conv₁(conv(dropout(x), A), B)

Shapes, for a kernel of one to three dimensions K and G groups: W0 (O, I/G, K), A (R, I, K),
B (O, R/G, 1, …). Without groups, ΔW = s · B A as for a linear layer.

As in PEFT, A convolves all channels and pads with zeros, whatever the base does; only B has groups.
So the sum is no kernel of a base with groups or with another padding, which cannot be merged.
"""

from collections.abc import Callable
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

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUNCTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""Number of dimensions of the kernel → the function."""


def is_convolution(module: nn.Module) -> bool:
    """Return whether `module` computes what a convolution of PyTorch does."""
    for kind in KINDS:
        if isinstance(module, kind):
            is_forward = type(module).forward is kind.forward
            return is_forward and type(module)._conv_forward is kind._conv_forward
    return False


class LoraConv(nn.Module):
    """An update over a frozen convolution with a kernel of one to three dimensions.

    Attributes:
        lora_A: (r, in, kernel), trained.
        lora_B: (out, r/groups, 1, …), trained; initialized to zero.
        lora_bias: (out,), trained, inside the scale; None if the config has none.
        magnitude: (1, out, 1, …), under DoRA.
    """

    row_squares: Tensor | None

    def __init__(self, base: Convolution, target: Target, config: LoraConfig) -> None:
        """Build a zero update over `base`; `reset` initializes it.

        Raises:
            TargetError: the convolution is grouped, and the rank or a setting does not fit.
        """
        super().__init__()
        _check_groups(base, target, config)
        out = base.out_channels
        ones = (1,) * len(base.kernel_size)
        device = execution_device(base)
        self.base = base
        self.scale = target.scale
        self.dropout = config.lora_dropout
        self.lora_A = _zeros(target.rank, base.in_channels, *base.kernel_size, device=device)
        self.lora_B = _zeros(out, target.rank // base.groups, *ones, device=device)
        self.lora_bias = _zeros(out, device=device) if config.lora_bias else None
        self.trained_bias = None
        if base.bias is not None and config.bias != "none":
            self.trained_bias = nn.Parameter(loaded(base.bias, base).detach().clone())
        self.magnitude = _zeros(1, out, *ones, device=device) if config.use_dora else None
        squares = torch.zeros(out, device=device) if config.use_dora else None
        self.register_buffer("row_squares", squares, persistent=False)

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw A again and make B·A zero: the layer equals its base."""
        a, b = self.lora_A.flatten(1), self.lora_B.flatten(1)  # over the same memory
        init_factors(a, b, name=name, config=config, seed=seed)
        if self.lora_bias is not None:
            self.lora_bias.zero_()
        if self.magnitude is not None and self.row_squares is not None:
            self.row_squares.copy_(squared_row_norms(self._weight()))
            self.magnitude.copy_(self.row_squares.sqrt().view_as(self.magnitude))

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, in, …) to (N, out, …); N can be absent."""
        y = self._base_product(input)
        dropped = F.dropout(input, self.dropout, self.training).to(y.device, self.lora_A.dtype)
        y = y + self._update(dropped).to(y.dtype)
        if self.magnitude is None:
            return y
        y = y * self._by_channel(self._row_factors()).to(y.dtype)
        bias = self.plain_bias
        return y if bias is None else y + self._by_channel(bias).to(y.dtype)

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
        """Return ΔW, (out, in·kernel) in float32; under DoRA with the change of row norms.

        With groups, it is a kernel over all input channels, which the base does not have.
        """
        change = dense_update(*self._factors(), self.scale)
        if self.magnitude is None:
            return change
        return self._row_factors()[:, None] * (self._weight() + change) - self._weight()

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the kernel with the update, in float32, and the bias if it is trained.

        Raises:
            MergeError: the base has groups, another padding than zeros, or no bias to change.
        """
        if not self.is_mergeable:
            base = self._base()
            raise MergeError(
                f"a convolution with groups={base.groups} and padding_mode="
                f"{base.padding_mode!r} has no kernel that computes its update as well; "
                "use the adapter unmerged"
            )
        total = self._weight() + self.delta()
        merged = {"weight": total.view(self._base().weight.shape)}
        bias = self._merged_bias()
        return merged if bias is None else {**merged, "bias": bias}

    @property
    def is_mergeable(self) -> bool:
        """Whether one kernel of the base's layout can compute what the layer computes."""
        base = self._base()
        return base.groups == 1 and base.padding_mode == "zeros"

    @property
    def weight(self) -> Tensor:
        """The effective kernel, for models that read it.

        It is the stored one if the base is offloaded, or if no kernel includes the update.
        """
        stored = self._base().weight
        if stored.is_meta or not stored.numel() or not self.is_mergeable:
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
            plain: Tensor = base._conv_forward(x, base.weight, bias)
            return plain
        y: Tensor = base(x)
        if base.bias is not None and bias is not base.bias:
            y = y - self._by_channel(loaded(base.bias, base)).to(y.dtype)
        if bias is not None and bias is not base.bias:
            y = y + self._by_channel(bias).to(y.dtype)
        return y

    def _update(self, x: Tensor) -> Tensor:
        """Return s · B A x; A has the stride, padding and dilation of the base, B its groups."""
        base = self._base()
        down = self._function(x, self.lora_A, None, base.stride, base.padding, base.dilation)
        up = self._function(down, self.lora_B, self.lora_bias, groups=base.groups)
        return up * self.scale

    @property
    def _function(self) -> Callable[..., Tensor]:
        return FUNCTIONS[len(self._base().kernel_size)]

    def _by_channel(self, values: Tensor) -> Tensor:
        """Return (out,) as (out, 1, …), which fits outputs with and without a batch dimension."""
        return values.view(-1, *(1,) * len(self._base().kernel_size))

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
        """Return A and B as matrices, (r, in·kernel) and (out, r)."""
        b = self.lora_B.flatten(1)
        groups = self._base().groups
        if groups > 1:  # the outputs of a group read its part of the rank only
            b = torch.block_diag(*b.chunk(groups))
        return self.lora_A.flatten(1), b

    def _weight(self) -> Tensor:
        return loaded(self._base().weight, self._base()).flatten(1).float()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return base_attribute(self, name)

    def _base(self) -> Convolution:
        assert isinstance(self.base, KINDS)
        return self.base


def _zeros(*shape: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device))


def _check_groups(base: Convolution, target: Target, config: LoraConfig) -> None:
    """Refuse what an update of a grouped convolution cannot have."""
    if base.groups == 1:
        return
    where = f"{target.name}, a convolution with groups={base.groups}"
    if target.rank % base.groups:
        raise TargetError(
            f"rank {target.rank} of {where}, must be a multiple of the groups; "
            "set it in rank_pattern, or leave the module out of target_modules"
        )
    if config.use_dora or config.init_lora_weights == "orthogonal":
        setting = "use_dora=True" if config.use_dora else "init_lora_weights='orthogonal'"
        raise TargetError(
            f"{setting} has no meaning for {where}, whose kernel has other rows than its update; "
            "leave the module out of target_modules"
        )
