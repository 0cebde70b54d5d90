"""LoraExperts: the experts of a mixture, held as stacks of matrices, with a trained low-rank update beside each one.

    y_e = x_e W_eᵀ + s · (x_e A_eᵀ) B_eᵀ        e: one expert, x_e: the tokens routed to it

A stack is the largest weight of its model, and ΔW would be as large: it is never formed. Each expert sees its own tokens
alone, and of each product only its input is kept for the backward pass.

Shapes: N tokens, K experts a token, E experts, H hidden, I inner, R rank.
    gate_up_proj (E, 2I, H), down_proj (E, H, I); hidden_states (N, H), top_k_index and top_k_weights (N, K)
    lora_A (E·R, in), lora_B (out, R·E), in the order of `expert_layout.py`

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base.quant import Kind
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
from lora_core.layers.functional import lora_linear, without_autocast

Factors = dict[str, list[tuple[Tensor, Tensor]]]


class LoraExperts(nn.Module):
    """A frozen experts module `base` with an update of low rank for each expert of one or both of its stacks.

    With all B at zero it is the base's own loop over the experts, to the last bit. Grouped or batched kernels add the
    same products in another order: a base that ran on one differs from this by a few roundings.

    There is no dropout: PEFT refuses an adapter of such weights that asks for any.

    Attributes:
        lora_A: stack → (E·R, in), trained.
        lora_B: stack → (out, R·E), trained; zero at the start.
        scales: stack → the factor of B·A.
    """

    def __init__(self, base: nn.Module, sizes: Mapping[str, tuple[int, float]]) -> None:
        """Build updates of zero over `base`, on its device; the A are still empty, `reset` fills them.

        Args:
            base: the experts module.
            sizes: the stacks to adapt, each with its rank and scale.

        Raises:
            TargetError: `base` has another layout, or no stack of such a name.
        """
        super().__init__()
        shapes = factor_shapes(base, {name: rank for name, (rank, _) in sizes.items()})
        device = next(base.parameters()).device
        self.base = base
        self.scales = {name: sizes[name][1] for name in shapes}
        # in pairs: a ParameterDict would sort a mapping, and the keys in the file depend on the module's order
        self.lora_A = nn.ParameterDict(
            (name, torch.empty(a, device=device, dtype=torch.float32))
            for name, (a, _) in shapes.items()
        )
        self.lora_B = nn.ParameterDict(
            (name, torch.zeros(b, device=device, dtype=torch.float32))
            for name, (_, b) in shapes.items()
        )

    @torch.no_grad()
    def reset(self, path: str, method: InitMethod, seed: int) -> None:
        """Draw every A anew for the module at `path` and set every B to zero: the layer is its base again."""
        for name, a in self.lora_A.items():
            generator, experts = generator_for(f"{path}.{name}", seed), self._stack(name).shape[0]
            rank, in_features = a.shape[0] // experts, a.shape[1]
            a.copy_(
                torch.cat([initial_a(rank, in_features, method, generator) for _ in range(experts)])
            )
            self.lora_B[name].zero_()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return (N, H): for each token the weighted sum of what its K experts answer, added in the order of the experts."""
        factors = {name: list(zip(*self._by_expert(name), strict=True)) for name in self.lora_A}
        total = torch.zeros_like(hidden_states)
        rows, slots, counts = _grouped(top_k_index, self._stack("down_proj").shape[0])
        routed = (hidden_states[rows], top_k_weights[rows, slots, None], rows)
        for expert, (x, weights, own) in enumerate(
            zip(*(whole.split(counts) for whole in routed), strict=True)
        ):
            if len(own):
                gate_up = self._product("gate_up_proj", x, expert, factors)
                inner = self.base._apply_gate(gate_up)  # type: ignore[operator]
                answer = self._product("down_proj", inner, expert, factors) * weights
                total.index_add_(0, own, answer.to(total.dtype))
        return total

    @property
    def trained_weights(self) -> int:
        """How many weights an optimiser would change."""
        return sum(parameter.numel() for parameter in self.adapter_tensors().values())

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors under PEFT's keys, less the module's path and its dot."""
        keys = peft_keys(self.lora_A)
        return {
            key: factor[name]
            for name, pair in keys.items()
            for key, factor in zip(pair, (self.lora_A, self.lora_B), strict=True)
        }

    def merged_tensors(self) -> dict[str, Tensor]:
        """What a merge puts into the base, by the parameter's name."""
        return self.merged()

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Return W + s · B A of each adapted stack, (E, out, in) in float32; the base stays as it is."""
        sums = {}
        for name, scale in self.scales.items():
            a_ERI, b_EOR = (torch.stack(factors).float() for factors in self._by_expert(name))
            with without_autocast(a_ERI):
                sums[name] = torch.baddbmm(self._stack(name).float(), b_EOR, a_ERI, alpha=scale)
        return sums

    def extra_repr(self) -> str:
        experts = self._stack("down_proj").shape[0]
        return ", ".join(
            f"{name}: rank={a.shape[0] // experts}, scale={self.scales[name]:g}"
            for name, a in self.lora_A.items()
        )

    def _stack(self, name: str) -> Tensor:
        stack: Tensor = getattr(self.base, name)
        return stack.detach()  # frozen, whether the base still asks for its gradient or not

    def _by_expert(self, name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Split A and B by expert, each in one step: so their gradients are put together once, not summed E times."""
        experts, (out_features, columns) = self._stack(name).shape[0], self.lora_B[name].shape
        a_ERI = self.lora_A[name].view(experts, columns // experts, -1)
        b_ORE = self.lora_B[name].view(out_features, columns // experts, experts)
        return a_ERI.unbind(0), b_ORE.unbind(2)

    def _product(self, name: str, x: Tensor, expert: int, factors: Factors) -> Tensor:
        weight = ExpertWeight(self._stack(name)[expert])
        x = x.to(weight.compute_dtype(x))
        if name not in factors:
            return F.linear(x, weight.dense(x.dtype))
        return lora_linear(x, weight, None, (*factors[name][expert], self.scales[name]))


@dataclass(frozen=True)
class ExpertWeight:
    """The matrix of one expert, (out, in), behind the seam of `quant.py`."""

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
    """Return the dtype in which autocast has products with `x` computed; None where it is off."""
    return (
        torch.get_autocast_dtype(x.device.type)
        if torch.is_autocast_enabled(x.device.type)
        else None
    )


def expert_targets(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Find the stacks of experts that `patterns` name in a model, whether adapted or not.

    As in PEFT, a pattern is a parameter's whole path or its last parts. PEFT adapts everything that matches, so a match
    that cannot be adapted is refused rather than left out.

    Args:
        model: on any device; not changed.
        patterns: such as `mlp.experts.gate_up_proj`.

    Returns:
        Module path → the names of its matched stacks, both in model order.

    Raises:
        TargetError: a pattern matches nothing, or what holds no experts in the layout that can be adapted.
    """
    found: dict[str, tuple[str, ...]] = {}
    unused = set(patterns)
    for path, module in _plain_modules(model):
        for name, _ in module.named_parameters(recurse=False):
            matching = {
                pattern for pattern in patterns if f".{path}.{name}".endswith(f".{pattern}")
            }
            if matching:
                _check_target(path, name, module)
                found[path] = (*found.get(path, ()), name)
            unused -= matching
    if unused:
        raise TargetError(
            f"target parameter {min(unused)!r} matches no parameter; stacks of experts here end in {_endings(model)}"
        )
    return found


def _grouped(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Group the pairs of token and slot by expert; return their tokens, their slots and how many each expert has.

    Within an expert they keep the order of the base's own loop: the last bit of a matrix product depends on it. The index
    that follows the last expert stands for none, and its pairs are left out.
    """
    tokens = top_k_index.shape[0]
    counts = top_k_index.flatten().bincount(minlength=experts).tolist()[:experts]
    order = top_k_index.T.flatten().argsort(stable=True)[: sum(counts)]
    return order % tokens, order // tokens, counts


def _check_target(path: str, name: str, module: nn.Module) -> None:
    objection = (
        objection_to(module)
        if path
        else "it is a weight of the model itself, which has no place to be replaced in"
    )
    if objection is not None:
        where = f"{path}.{name} of {type(module).__name__}".lstrip(".")
        raise TargetError(
            f"target parameter {where} cannot be adapted: {objection}; {EXPECTED}; leave it out"
        )


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what the model has without the adapters of its experts, under the paths it then has."""
    adapted = [module for module in model.modules() if isinstance(module, LoraExperts)]
    inside = {id(part) for layer in adapted for part in layer.modules() if part is not layer}
    for path, module in model.named_modules():
        if id(module) not in inside:
            yield path, module.base if isinstance(module, LoraExperts) else module


def _endings(model: nn.Module) -> str:
    paths = [path for path, module in _plain_modules(model) if path and supports(module)]
    endings = {f"{path.rpartition('.')[2]}.{name}" for path in paths for name in STACKS}
    return ", ".join(sorted(endings)) or "nothing: the model has none"
