"""Several adapters in one pass: each row of a batch, or segment of a pack, has its own adapter.

    y[i] = x[i] W0ᵀ + bias + s_i · dropout(x[i]) A_iᵀ B_iᵀ        i: the rows of one adapter

The product with the frozen weight is computed once for all rows, and a 4-bit weight is dequantized
once; each adapter's update is computed on its rows alone. Therefore an adapter gets the gradient
that its rows alone would give, and several adapters can be trained together (mLoRA, Ye et al. 2023,
arXiv 2312.02515; LoRAFusion, arXiv 2510.00206). `mixed_linear.py` has the product.

Shapes: x (…, I) with the rows along `Routing.dim`, A_i (R_i, I), B_i (O, R_i), y (…, O).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.bank.described import described_attribute
from lora_core.bank.mixed_linear import mixed_linear
from lora_core.bank.routing import Routing
from lora_core.base.quant import has_custom_forward
from lora_core.errors import RoutingError
from lora_core.layers.experts import LoraExperts
from lora_core.layers.linear import LoraLinear
from lora_core.layers.multihead_attention import LoraAttention
from lora_core.layers.parameters import LoraParameters


def mixed(base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> nn.Module:
    """Return the base module combined with the updates of several adapters.

    Args:
        base: the module of the base.
        layers: name of an adapter → its layer over `base`.
        route: which rows belong to which adapter.

    Raises:
        RoutingError: a layer updates weights that its base uses for all rows.
    """
    for name, layer in layers.items():
        if isinstance(layer, LoraAttention | LoraParameters):
            raise RoutingError(
                f"adapter {name!r} updates the weights of a {type(base).__name__}, which computes "
                "all rows with the same ones; run the rows of each adapter with Bank.using"
            )
    if any(isinstance(layer, LoraExperts) for layer in layers.values()):
        return MixedExperts(base, layers, route)
    return Mixed(base, layers, route)


class Mixed(nn.Module):
    """One module of the base with several adapters' updates, each on its own rows."""

    def __init__(self, base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> None:
        super().__init__()
        self.base = base
        self.layers = nn.ModuleList(layers.values())
        self.names = tuple(layers)
        self.route = route

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """Compute each adapter's rows with its update, and all other rows with the base.

        Args:
            x: (…, I), or the integer ids that an embedding reads.
            arguments: further arguments of the base's forward.

        Raises:
            RoutingError: the layout of `x` does not match the routing.
        """
        if x.is_floating_point():
            self.route.check_features(x)
        else:
            self.route.check(x)
        rows = [self.route.rows(name, x.device) for name in self.names]
        linear = [layer for layer in self.layers if isinstance(layer, LoraLinear)]
        are_all_linear = len(linear) == len(self.layers)
        if are_all_linear and not has_custom_forward(self.base):
            return mixed_linear(x, linear, rows)
        y: Tensor = self.base(x, *arguments)
        for layer, own in zip(self.layers, rows, strict=True):
            updated = layer(own.of(x), *arguments)
            y = y.index_copy(own.dim, own.indices, updated.to(y.dtype))
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return described_attribute(self, name)


class MixedExperts(nn.Module):
    """The experts of one module with several adapters' updates, each on the tokens of its rows.

    Tokens share no product here: each adapter reads the stacks for its own tokens. Experts see the
    flattened tokens of all rows and cannot detect a batch with other rows, so `check_rows` checks
    the input of the enclosing module.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, nn.Module], route: Routing) -> None:
        super().__init__()
        self.base = base
        self.layers = nn.ModuleList(layers.values())
        self.names = tuple(layers)
        self.route = route

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return each token's expert output, updated by the adapter of its row.

        Args:
            hidden_states: (N, H), the flattened tokens of all rows.
            top_k_index: (N, K), the experts of each token.
            top_k_weights: (N, K), the router's weights of these experts.

        Returns:
            (N, H), in the order of the tokens.

        Raises:
            RoutingError: N is not a multiple of the number of routed rows.
        """
        indices = self._token_indices(hidden_states)
        outputs: list[Tensor] = []
        for own, experts in zip(indices, [self.base, *self.layers], strict=True):
            if len(own) == 0:
                continue
            output = experts(
                hidden_states[own],
                top_k_index[own],
                top_k_weights[own],
            )
            outputs.append(output)
        if not outputs:
            return torch.zeros_like(hidden_states)
        order = torch.cat(indices).argsort()
        return torch.cat(outputs)[order]

    def check_rows(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Check the input of the enclosing module against the routing; a forward pre-hook.

        Args:
            _: the enclosing module.
            arguments: its positional arguments; the first tensor is the input.
            options: its keyword arguments.

        Raises:
            RoutingError: the layout of the input does not match the routing.
        """
        values = (*arguments, *options.values())
        x = next(value for value in values if isinstance(value, Tensor))
        self.route.check_features(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return described_attribute(self, name)

    def _token_indices(self, hidden_states: Tensor) -> list[Tensor]:
        """Return the indices of the tokens of the base alone, then those of each adapter."""
        count = len(hidden_states)
        device = hidden_states.device
        owned = [self.route.tokens(name, count, device) for name in self.names]
        is_free = torch.ones(count, dtype=torch.bool, device=device)
        is_free[torch.cat(owned)] = False
        free = is_free.nonzero()[:, 0]
        return [free, *owned]
