"""What `all-linear` leaves out although it multiplies its input by a matrix.

These are experts that are stored as stacks of matrices, the routers next to them, which hold a bare
weight, and linear layers with a forward of their own. PEFT's `all-linear` includes some of them in
some models, such as the experts and the router of Mixtral.
"""

import logging
from collections.abc import Iterator, Mapping

from torch import distributed, nn

from lora_core.base.quant import base_weight
from lora_core.candidates import find_candidates
from lora_core.config import ALL_LINEAR, LoraConfig
from lora_core.modules import (
    adapter_parts,
    modules_outside_language_model,
    output_head,
    plain_modules,
    unwrapped,
)

LOG = logging.getLogger(__name__)
Modules = Mapping[str, nn.Module]
"""Module path → module."""


def warn_of_left_out(model: nn.Module, config: LoraConfig) -> None:
    """Log which matrices `all-linear` leaves out, and which setting includes them; on rank 0.

    Args:
        model: with the adapter that `config` describes.
        config: of the adapter.
    """
    left_out = left_out_by_all_linear(model, config)
    if left_out and not (distributed.is_initialized() and distributed.get_rank()):
        named = [f"{ending} ({count})" for ending, count in left_out.items()]
        LOG.warning(
            "target_modules=%r adapts linear layers only and leaves out %s; add "
            "target_parameters=%s to adapt these as well, or name the targets instead",
            ALL_LINEAR,
            ", ".join(named),
            list(left_out),
        )


def left_out_by_all_linear(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """Return the endings of the left-out parameters, and how many parameters have each.

    An ending, such as `experts.down_proj`, is a name for `target_parameters`. The result is empty
    for other targets than `all-linear`.

    Args:
        model: adapted or not.
        config: of the adapter.
    """
    found: dict[str, int] = {}
    if config.target_modules != ALL_LINEAR:
        return found
    modules = _unadapted(model)
    stacks = [(path, name) for path, module in modules.items() for name in _stacks_in(module)]
    owners = {path.rpartition(".")[0] for path, _ in stacks}
    for path, name in (*stacks, *_other_matrices(modules, owners)):
        ending = f"{path.rpartition('.')[2]}.{name}"
        found[ending] = found.get(ending, 0) + 1
    return found


def _unadapted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the language model that LoRA neither adapts nor could adapt.

    What could be adapted and is not, such as an embedding, is no linear layer.
    """
    head = output_head(unwrapped(model))
    updated = {path for path, _ in adapter_parts(model)}
    covered = {*find_candidates(model), *updated, *modules_outside_language_model(model)}
    found: dict[str, nn.Module] = {}
    for path, module in plain_modules(model).items():
        is_covered = module is head or any(outer in covered for outer in _path_and_parents(path))
        if path and not is_covered:
            found[path] = module
    return found


def _path_and_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _stacks_in(module: nn.Module) -> list[str]:
    """Return the parameters of a module that hold several matrices."""
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and parameter.shape[0] > 1
    ]


def _other_matrices(modules: Modules, owners: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the path and parameter of routers, and of linear layers with another forward.

    Args:
        modules: path → module.
        owners: the modules that directly contain a module with stacks.
    """
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or min(weight.shape) < 2:
            continue
        is_router = path.rpartition(".")[0] in owners
        if is_router or (isinstance(module, nn.Linear) and base_weight(module) is None):
            yield path, "weight"
