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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base.quant import Kind, loaded
from lora_core.config import InitMethod
from lora_core.errors import TargetError
from lora_core.init.random import generator_for, initial_a
from lora_core.layers.expert_layout import (
    EXPECTED,
    STACKS,
    factor_shapes,
    objection_to,
    peft_keys,
    supports,
)
from lora_core.layers.functional import ScaledFactors, lora_linear, without_autocast

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

    @property
    def trained_weights(self) -> int:
        """Number of weights that an optimizer changes."""
        return sum(parameter.numel() for parameter in self.adapter_tensors().values())

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors under PEFT's keys, without the module's path and its dot."""
        tensors = {}
        for name, (key_a, key_b) in peft_keys(list(self.lora_A)).items():
            tensors[key_a] = self.lora_A[name]
            tensors[key_b] = self.lora_B[name]
        return tensors

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the merged stacks by the parameter's name."""
        return self.merged()

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Return W + s · B A of each adapted stack, (E, out, in) in float32; the base is kept."""
        sums = {}
        for name, scale in self.scales.items():
            a, b = self._unbound(name)
            a_ERI = torch.stack(a).float()
            b_EOR = torch.stack(b).float()
            weight = self._stack(name).float()
            with without_autocast(a_ERI):
                sums[name] = torch.baddbmm(weight, b_EOR, a_ERI, alpha=scale)
        return sums

    def extra_repr(self) -> str:
        experts = self._stack("down_proj").shape[0]
        parts = []
        for name, a in self.lora_A.items():
            rank = a.shape[0] // experts
            parts.append(f"{name}: rank={rank}, scale={self.scales[name]:g}")
        return ", ".join(parts)

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


def expert_targets(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Find the stacks of experts that `patterns` name in a model, adapted or not.

    As in PEFT, a pattern is a parameter's full path or its last parts. PEFT adapts everything that
    matches, so a match that cannot be adapted raises an error instead of being skipped.

    Args:
        model: on any device; not changed.
        patterns: such as `mlp.experts.gate_up_proj`.

    Returns:
        Module path → the names of its matched stacks, both in model order.

    Raises:
        TargetError: a pattern matches nothing, or a module without experts in a supported layout.
    """
    found: dict[str, tuple[str, ...]] = {}
    unused = set(patterns)
    for path, module in _plain_modules(model):
        for name, _ in module.named_parameters(recurse=False):
            matching = _matching(f"{path}.{name}", patterns)
            if matching:
                _check_target(path, name, module)
                found[path] = (*found.get(path, ()), name)
            unused -= matching
    if unused:
        raise TargetError(
            f"target parameter {min(unused)!r} matches no parameter; "
            f"stacks of experts here end in {_endings(model)}"
        )
    return found


def _matching(parameter: str, patterns: tuple[str, ...]) -> set[str]:
    return {pattern for pattern in patterns if f".{parameter}".endswith(f".{pattern}")}


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


def _check_target(path: str, name: str, module: nn.Module) -> None:
    objection = objection_to(module)
    if not path:
        objection = "it is a weight of the model itself, which cannot be replaced in a parent"
    if objection is not None:
        where = f"{path}.{name} of {type(module).__name__}".lstrip(".")
        raise TargetError(
            f"target parameter {where} cannot be adapted: {objection}; {EXPECTED}; leave it out"
        )


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the model has without its expert adapters, under their base paths."""
    inside: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, LoraExperts):
            inside |= {id(part) for part in layer.modules() if part is not layer}
    for path, module in model.named_modules():
        if id(module) not in inside:
            yield path, module.base if isinstance(module, LoraExperts) else module


def _endings(model: nn.Module) -> str:
    endings: set[str] = set()
    for path, module in _plain_modules(model):
        if path and supports(module):
            last = path.rpartition(".")[2]
            endings |= {f"{last}.{name}" for name in STACKS}
    return ", ".join(sorted(endings)) or "nothing: the model has none"
