"""LoraParameters: low-rank updates of parameters that a module has directly, whatever it computes.

    W' = W + s · B A         W (O, I), or one such matrix for each of E experts: (E, O, I)

The module computes with W' in place of W, as in PEFT. W' is as large as W, so stacks of experts
that `LoraExperts` supports use that layer, which forms no sum. Other experts, such as those of
Llama 4 and gpt-oss, and parameters of any other module are adapted here.

Shapes: E experts (1 for a matrix), R rank; a module with `is_transposed` stores (E, I, O).
    lora_A (E·R, I), lora_B (O, R·E), in the order of `expert_layout.py`

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_core.base.quant import has_custom_forward
from lora_core.config import InitMethod
from lora_core.errors import TargetError
from lora_core.init.random import generator_for, initial_a
from lora_core.layers.expert_layout import peft_keys
from lora_core.layers.functional import without_autocast
from lora_core.modules import base_attribute


@dataclass(frozen=True)
class MatrixStack:
    """How a parameter holds matrices W (out, in)."""

    experts: int
    out_features: int
    in_features: int
    transposed: bool
    """Whether each matrix is stored as (in, out)."""


class LoraParameters(nn.Module):
    """A frozen module `base` that computes with updates of some of its parameters.

    There is no dropout: the inputs of the parameter's product are not known here.

    Attributes:
        lora_A: parameter's name → (E·R, in), trained.
        lora_B: parameter's name → (out, R·E), trained; initialized to zero.
        scales: parameter's name → the factor of B·A.
    """

    def __init__(self, base: nn.Module, sizes: Mapping[str, tuple[int, float]]) -> None:
        """Build zero updates over `base`, on its device; `reset` initializes A.

        Args:
            base: the module that has the parameters.
            sizes: name of a parameter, in the module's order → the rank and scale of its update.

        Raises:
            TargetError: a parameter cannot be adapted.
        """
        super().__init__()
        self.base = base
        self.stacks = {name: matrices_in(base, name) for name in sizes}
        self.scales: dict[str, float] = {}
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for name, stack in self.stacks.items():
            rank, scale = sizes[name]
            device = base.get_parameter(name).device
            columns = stack.experts * rank
            self.scales[name] = scale
            self.lora_A[name] = torch.empty(columns, stack.in_features, device=device)
            self.lora_B[name] = torch.zeros(stack.out_features, columns, device=device)

    @torch.no_grad()
    def reset(self, path: str, method: InitMethod, seed: int) -> None:
        """Draw every A again for the module at `path` and zero every B: the layer is its base."""
        for name, a in self.lora_A.items():
            generator = generator_for(f"{path}.{name}", seed)
            rank = a.shape[0] // self.stacks[name].experts
            for rows in a.split(rank):
                rows.copy_(initial_a(rank, a.shape[1], method, generator))
            self.lora_B[name].zero_()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the base computes with the updated parameters."""
        effective = {name: self.effective(name) for name in self.scales}
        return functional_call(self.base, effective, arguments, options)

    def effective(self, name: str) -> Tensor:
        """Return W + s · B A in the layout and dtype of the parameter, with its gradient."""
        stored: Tensor = getattr(self.base, name)  # a tensor in a replica of DataParallel
        return self._sum(name, stored.detach())

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors under PEFT's keys, without the module's path and its dot."""
        tensors = {}
        for name, (key_a, key_b) in peft_keys(list(self.scales)).items():
            tensors[key_a] = self.lora_A[name]
            tensors[key_b] = self.lora_B[name]
        return tensors

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return W + s · B A of each adapted parameter, in float32."""
        merged: dict[str, Tensor] = {}
        for name in self.scales:
            merged[name] = self._sum(name, self.base.get_parameter(name).float())
        return merged

    def extra_repr(self) -> str:
        parts = []
        for name, stack in self.stacks.items():
            rank = self.lora_A[name].shape[0] // stack.experts
            parts.append(f"{name}: rank={rank}, scale={self.scales[name]:g}")
        return ", ".join(parts)

    def _sum(self, name: str, stored: Tensor) -> Tensor:
        """Return the sum in the dtype and layout of `stored`."""
        stack = self.stacks[name]
        a_ERI = self.lora_A[name].view(stack.experts, -1, stack.in_features).to(stored)
        b_ORE = self.lora_B[name].view(stack.out_features, -1, stack.experts).to(stored)
        b_EOR = b_ORE.permute(2, 0, 1)
        left, right = (b_EOR, a_ERI)
        if stack.transposed:
            left, right = (a_ERI.mT, b_EOR.mT)
        with without_autocast(stored):
            total = torch.baddbmm(
                stored.view(-1, *stored.shape[-2:]), left, right, alpha=self.scales[name]
            )
        return total.view(stored.shape)

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the base; of its parameters, the updated ones."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self._modules.get("base")
            if base is None or name not in base._parameters:
                return base_attribute(self, name)
            return self.effective(name) if name in self.scales else base._parameters[name]


def matrices_in(module: nn.Module, name: str) -> MatrixStack:
    """Return the matrices that the parameter `name` of `module` holds, as PEFT reads it.

    Raises:
        TargetError: an update of the parameter has no meaning or could not be used.
    """
    objection = objection_to_parameter(module, name)
    if objection is not None:
        raise TargetError(f"{name} of {type(module).__name__} cannot be adapted: {objection}")
    *experts, rows, columns = module.get_parameter(name).shape
    if experts and getattr(module, "is_transposed", False):
        return MatrixStack(experts[0], columns, rows, transposed=True)
    return MatrixStack(experts[0] if experts else 1, rows, columns, transposed=False)


def objection_to_parameter(module: nn.Module, name: str) -> str | None:
    """Return why a parameter that `module` has directly cannot be adapted, or None if it can."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return "the module has no such parameter"
    if parameter.dim() not in (2, 3):
        return f"its shape is {tuple(parameter.shape)}, and only matrices and stacks have an update"
    if not parameter.is_floating_point() or parameter.itemsize == 1:
        return f"it is stored in {parameter.dtype}; load the base in full precision"
    if parameter.is_meta and has_custom_forward(module):
        return "it is offloaded; load the base without offloading"
    return None


def parameter_targets(
    modules: Mapping[str, nn.Module], patterns: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """Find the parameters that `patterns` name in a model.

    As in PEFT, a pattern is a parameter's full path or its last parts. PEFT adapts everything that
    matches, so a match that cannot be adapted raises an error instead of being skipped.

    Args:
        modules: path → module, without an adapter; not changed.
        patterns: such as `mlp.experts.gate_up_proj`.

    Returns:
        Module path → the names of its matched parameters, both in model order.

    Raises:
        TargetError: a pattern matches nothing, or a parameter that cannot be adapted.
    """
    found: dict[str, tuple[str, ...]] = {}
    unused = set(patterns)
    for path, module in modules.items():
        for name in module._parameters:
            matching = _matching(f"{path}.{name}", patterns)
            if matching:
                _check_target(path, name, module)
                found[path] = (*found.get(path, ()), name)
            unused -= matching
    if unused:
        raise TargetError(
            f"target parameter {min(unused)!r} matches no parameter; "
            f"stacks of experts here end in {_stack_endings(modules)}"
        )
    return found


def _matching(parameter: str, patterns: tuple[str, ...]) -> set[str]:
    return {pattern for pattern in patterns if f".{parameter}".endswith(f".{pattern}")}


def _check_target(path: str, name: str, module: nn.Module) -> None:
    objection = objection_to_parameter(module, name)
    if not path:
        objection = "it is a weight of the model itself, which cannot be replaced in a parent"
    if objection is not None:
        where = f"{path}.{name} of {type(module).__name__}".lstrip(".")
        raise TargetError(
            f"target parameter {where} cannot be adapted: {objection}; or leave it out"
        )


def _stack_endings(modules: Mapping[str, nn.Module]) -> str:
    """Return the last parts of the paths of all stacks of matrices."""
    endings: set[str] = set()
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if path and parameter is not None and parameter.dim() == 3:
                endings.add(f"{path.rpartition('.')[2]}.{name}")
    return ", ".join(sorted(endings)) or "nothing: the model has none"
