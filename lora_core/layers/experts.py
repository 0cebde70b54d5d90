"""LoraExperts: the experts of a mixture, stored as stacks of matrices, each with a low-rank update.

    y_e = x_e W_eᵀ + s · (x_e A_eᵀ) B_eᵀ        e: one expert, x_e: the tokens routed to it

A stack is the largest weight of its model, and ΔW would be as large, so it is never formed. Each
expert processes only its own tokens, and each product saves only its input for the backward pass.

Shapes: N tokens, K experts per token, E experts, H hidden, I inner, R rank.
    gate_up_proj (E, 2I, H), down_proj (E, H, I)
    hidden_states (N, H), top_k_index and top_k_weights (N, K)
    lora_A (E·R, in), lora_B (out, R·E), in the order of `expert_layout.py`

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base.quant import Kind, loaded
from lora_core.config import InitMethod
from lora_core.init.random import generator_for, initial_a
from lora_core.layers.expert_layout import STACKS, factor_shapes, peft_keys
from lora_core.layers.functional import ScaledFactors, lora_linear, without_autocast
from lora_core.modules import base_attribute

Factors = dict[str, list[ScaledFactors]]
"""Stack → A, B and scale of each expert."""


class LoraExperts(nn.Module):
    """A frozen experts module `base` with a low-rank update per expert of one or both stacks.

    If all B are zero, it computes the base's own loop over the experts, bit for bit. Grouped or
    batched kernels add the same products in another order: a base that runs on one differs from
    this module by a few roundings.

    There is no dropout: PEFT refuses an adapter of such weights that sets one.

    Attributes:
        lora_A: stack → (E·R, in), trained.
        lora_B: stack → (out, R·E), trained; initialized to zero.
        scales: stack → the factor of B·A.
    """

    def __init__(self, base: nn.Module, sizes: Mapping[str, tuple[int, float]]) -> None:
        """Build zero updates over `base`, on its device; `reset` initializes A.

        Args:
            base: the experts module.
            sizes: the stacks to adapt, each with its rank and scale.

        Raises:
            TargetError: `base` has another layout or lacks a named stack.
        """
        super().__init__()
        shapes = factor_shapes(base, {name: rank for name, (rank, _) in sizes.items()})
        device = next(base.parameters()).device
        self.base = base
        self.scales: dict[str, float] = {}
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        # One by one: ParameterDict sorts a mapping, and the keys in the file follow module order.
        for name, (a_shape, b_shape) in shapes.items():
            self.scales[name] = sizes[name][1]
            self.lora_A[name] = torch.empty(a_shape, device=device, dtype=torch.float32)
            self.lora_B[name] = torch.zeros(b_shape, device=device, dtype=torch.float32)

    @torch.no_grad()
    def reset(self, path: str, method: InitMethod, seed: int) -> None:
        """Draw every A again for the module at `path` and zero every B: the layer is its base."""
        for name, a in self.lora_A.items():
            generator = generator_for(f"{path}.{name}", seed)
            experts = self._stack(name).shape[0]
            rank, in_features = a.shape[0] // experts, a.shape[1]
            for rows in a.split(rank):
                rows.copy_(initial_a(rank, in_features, method, generator))
            self.lora_B[name].zero_()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return (N, H): the weighted sum of the outputs of each token's K experts.

        The sum is taken in the order of the experts.
        """
        factors = {name: self._by_expert(name) for name in self.lora_A}
        total = torch.zeros_like(hidden_states)
        tokens, slots, counts = _grouped(top_k_index, self._stack("down_proj").shape[0])
        inputs = hidden_states[tokens].split(counts)
        weights = top_k_weights[tokens, slots, None].split(counts)
        for expert, rows in enumerate(tokens.split(counts)):
            if not len(rows):
                continue
            gate_up = self._product("gate_up_proj", inputs[expert], expert, factors)
            inner = self.base._apply_gate(gate_up)  # type: ignore[operator]
            output = self._product("down_proj", inner, expert, factors) * weights[expert]
            total.index_add_(0, rows, output.to(total.dtype))
        return total

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors under PEFT's keys, without the module's path and its dot."""
        tensors = {}
        for name, (key_a, key_b) in peft_keys(list(self.lora_A)).items():
            tensors[key_a] = self.lora_A[name]
            tensors[key_b] = self.lora_B[name]
        return tensors

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return W + s · B A of each adapted stack, (E, out, in) in float32; the base is kept."""
        return {name: self._sum(name, self._stack(name).float()) for name in self.scales}

    def extra_repr(self) -> str:
        experts = self._stack("down_proj").shape[0]
        parts = []
        for name, a in self.lora_A.items():
            rank = a.shape[0] // experts
            parts.append(f"{name}: rank={rank}, scale={self.scales[name]:g}")
        return ", ".join(parts)

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the base and, for models that read a stack, the effective one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in STACKS:
                return self._effective(name)
            return base_attribute(self, name)

    def _effective(self, name: str) -> Tensor:
        """Return W + s · B A, (E, out, in) in the stack's dtype, with its gradient."""
        stack = self._stack(name)
        if name not in self.scales or stack.is_meta:
            return stack
        return self._sum(name, stack)

    def _sum(self, name: str, stack: Tensor) -> Tensor:
        """Return the sum in the dtype of `stack`, (E, out, in)."""
        a, b = self._unbound(name)
        a_ERI = torch.stack(a).to(stack)
        b_EOR = torch.stack(b).to(stack)
        with without_autocast(stack):
            return torch.baddbmm(stack, b_EOR, a_ERI, alpha=self.scales[name])

    def _stack(self, name: str) -> Tensor:
        stack: Tensor = loaded(getattr(self.base, name), self.base)
        return stack.detach()  # frozen, whether or not the base still requires its gradient

    def _by_expert(self, name: str) -> list[ScaledFactors]:
        pairs = zip(*self._unbound(name), strict=True)
        return [ScaledFactors(a, b, self.scales[name]) for a, b in pairs]

    def _unbound(self, name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Split A and B by expert, each in one step.

        Their gradients are then assembled once instead of summed E times.
        """
        experts = self._stack(name).shape[0]
        out_features, columns = self.lora_B[name].shape
        rank = columns // experts
        a_ERI = self.lora_A[name].view(experts, rank, -1)
        b_ORE = self.lora_B[name].view(out_features, rank, experts)
        return a_ERI.unbind(0), b_ORE.unbind(2)

    def _product(self, name: str, x: Tensor, expert: int, factors: Factors) -> Tensor:
        weight = ExpertWeight(self._stack(name)[expert])
        x = x.to(weight.compute_dtype(x))
        if name not in factors:
            return F.linear(x, weight.dense(x.dtype))
        return lora_linear(x, weight, bias=None, update=factors[name][expert])


@dataclass(frozen=True)
class ExpertWeight:
    """The matrix of one expert, (out, in), behind the interface of `quant.py`."""

    stored: Tensor
    kind: Kind = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.stored.shape[0], self.stored.shape[1])

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return autocast_dtype(x) or x.dtype

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.dense(x.dtype), bias)

    def output_dtype(self, x: Tensor, y: Tensor) -> torch.dtype:
        return y.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.stored.to(dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast computes products with `x`; None if it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _grouped(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Group the pairs of token and slot by expert.

    Returns their tokens, their slots and the number of pairs per expert. Within an expert the pairs
    keep the order of the base's own loop: the last bit of a matrix product depends on it. The index
    after the last expert means "no expert", and its pairs are dropped.
    """
    tokens = top_k_index.shape[0]
    counts = top_k_index.flatten().bincount(minlength=experts).tolist()[:experts]
    order = top_k_index.T.flatten().argsort(stable=True)[: sum(counts)]
    return order % tokens, order // tokens, counts
