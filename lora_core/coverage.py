"""What an adapter over the named modules covers, and refusals of what it would cover in part.

A name such as `q_proj` can match linear layers in one part of a model and wrappers of another kind
in the next. An adapter over the former alone is not what the name promises.
"""

from collections.abc import Collection, Mapping

from torch import nn

from lora_core.config import Names
from lora_core.errors import TargetError
from lora_core.modules import unwrapped

EXAMPLES = 3
"""How many modules of each kind a message names."""


def has_own_weight(module: nn.Module) -> bool:
    """Return whether the module holds its weight itself.

    Pruning, weight normalization and parametrizations compute it from other tensors at every call,
    so a change to it would not last.
    """
    return module._parameters.get("weight") is not None


def refuse_partial_match(
    patterns: Names,
    selected: Collection[str],
    *,
    adaptable: Collection[str],
    modules: Mapping[str, nn.Module],
) -> None:
    """Raise if `patterns` select modules that LoRA cannot adapt among others that it can.

    A regular expression can match a region of the model, and then it also matches the containers
    in it and what has no weight matrix, such as norms. Those are accepted.

    Args:
        patterns: the setting, for the message.
        selected: paths of all modules that the setting selects.
        adaptable: paths of the modules of the model that can be adapted.
        modules: path → module, for the complete model.

    Raises:
        TargetError: the patterns select both kinds.
    """
    targets = [name for name in selected if name in adaptable]
    others = [name for name in selected if name not in adaptable]
    if isinstance(patterns, str):
        chosen = set(selected)
        others = [name for name in others if not _is_in_region(name, chosen, targets, modules)]
    if others:
        first_targets = ", ".join(targets[:EXAMPLES]) or "none"
        first_others = ", ".join(_describe(name, modules[name]) for name in others[:EXAMPLES])
        raise TargetError(
            f"target_modules={patterns!r} selects {len(targets)} modules that can be adapted "
            f"({first_targets}) and {len(others)} that cannot ({first_others}), so the adapter "
            "would cover only a part of what is named; use names or paths that match only the "
            "former, or name the latter in exclude_modules"
        )


def computing_embeddings(
    model: nn.Module, path: str, users: Mapping[str, nn.Module]
) -> dict[str, nn.Embedding]:
    """Return the embeddings that compute with the weight that the one at `path` only holds.

    Encoder-decoder models have such an embedding, `shared`, and never call it. The result is empty
    for any other embedding.

    Args:
        model: for its config and its input embedding.
        path: path of the embedding.
        users: path → the other modules with its weight.
    """
    config = getattr(unwrapped(model), "config", None)
    if not (getattr(config, "is_encoder_decoder", False) and _is_input(model, path)):
        return {}
    return {name: user for name, user in users.items() if isinstance(user, nn.Embedding)}


def refuse_unused_copy(path: str, computing: Collection[str]) -> None:
    """Raise if an embedding that is trained in full only holds the weight of other embeddings.

    Args:
        path: path of the embedding.
        computing: paths of the embeddings that `computing_embeddings` returned.

    Raises:
        TargetError: there are such embeddings.
    """
    if computing:
        raise TargetError(
            f"modules_to_save names {path}, which only holds the weight that "
            f"{' and '.join(computing)} compute with, so training a copy of it has no effect; "
            "name those instead"
        )


def _is_input(model: nn.Module, path: str) -> bool:
    """Return whether the model's getter returns the module at `path`, adapted or not."""
    getter = getattr(unwrapped(model), "get_input_embeddings", None)
    if getter is None:
        return False
    found = getter()
    return any(module is found for name, module in unwrapped(model).named_modules() if name == path)


def _is_in_region(
    name: str, selected: Collection[str], targets: list[str], modules: Mapping[str, nn.Module]
) -> bool:
    """Return whether the module contains a target, or is without matrices where all is selected."""
    if any(target.startswith(f"{name}.") or not name for target in targets):
        return True
    if any(parameter.dim() > 1 for parameter in modules[name].parameters()):
        return False
    parent = name.rpartition(".")[0]
    siblings = [other for other in modules if other and other.rpartition(".")[0] == parent]
    is_all_selected = all(sibling in selected for sibling in siblings)
    return parent in selected or (len(siblings) > 1 and is_all_selected)


def _describe(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and not has_own_weight(module):
        kind += " whose weight is computed from other tensors, as by pruning; make it permanent"
    return f"{name}: {kind}"
