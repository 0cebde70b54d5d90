"""What an adapter over the named modules covers, and refusals of what it would cover in part.

A name such as `q_proj` can match linear layers in one part of a model and wrappers of another kind
in the next. An adapter over the former alone is not what the name promises.
"""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lora_core.config import Names
from lora_core.errors import TargetError
from lora_core.modules import call_getter, unwrapped

EXAMPLES = 3
"""How many modules of each kind a message names."""
COMPUTED_FROM = ("_orig", "_g", "_v")
"""Endings of the parameters from which `torch.nn.utils` computes a tensor."""
PERMANENT = (
    "make it permanent with torch.nn.utils.prune.remove, remove_weight_norm or "
    "parametrize.remove_parametrizations"
)
"""What to do about a computed tensor."""


def has_own_weight(module: nn.Module) -> bool:
    """Return whether the module holds its weight itself.

    Pruning, weight normalization and parametrizations compute it from other tensors at every call,
    so a change to it would not last.
    """
    return module._parameters.get("weight") is not None


def computed_tensors(module: nn.Module) -> list[str]:
    """Return the tensors of the module that a hook computes from others at every call.

    These are what `torch.nn.utils` prunes or normalizes: `weight` from `weight_orig` or from
    `weight_g` and `weight_v`. A copy of the module would not compute them again.
    """
    found: list[str] = []
    for name, value in vars(module).items():
        sources = [f"{name}{suffix}" for suffix in COMPUTED_FROM]
        if isinstance(value, Tensor) and any(one in module._parameters for one in sources):
            found.append(name)
    return found


def refuse_computed(module: nn.Module, path: str, *, tensor: str, setting: str) -> None:
    """Raise if the module at `path` computes its weight or bias from other tensors.

    A part that replaces the module would not compute it again.

    Raises:
        TargetError: `tensor` is in `module` and not its parameter; `setting` is in the message.
    """
    if getattr(module, tensor, None) is not None and module._parameters.get(tensor) is None:
        raise TargetError(
            f"{setting} selects {path}, whose {tensor} is computed from other tensors at every "
            f"call, as by pruning or weight normalization; {PERMANENT}"
        )


def describe_kind(module: nn.Module) -> str:
    """Return a module's type and, if its weight is computed, that reason."""
    kind = type(module).__name__
    is_supported = isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if is_supported and not has_own_weight(module):
        kind += f" whose weight is computed from other tensors, as by pruning; {PERMANENT}"
    return kind


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
        kinds = [f"{name}: {describe_kind(modules[name])}" for name in others[:EXAMPLES]]
        first_others = ", ".join(kinds)
        raise TargetError(
            f"target_modules={patterns!r} selects {len(targets)} modules that can be adapted "
            f"({first_targets}) and {len(others)} that cannot ({first_others}), so the adapter "
            "would cover only a part of what is named; use names or paths that match only the "
            "former, or name the latter in exclude_modules"
        )


def computing_embeddings(
    model: nn.Module,
    path: str,
    users: Mapping[str, nn.Module],
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
    plain = unwrapped(model)
    found = call_getter(plain, "get_input_embeddings")
    return found is not None and dict(plain.named_modules()).get(path) is found


def _is_in_region(
    name: str,
    selected: Collection[str],
    targets: list[str],
    modules: Mapping[str, nn.Module],
) -> bool:
    """Return whether the module contains a target, or is without matrices where all is selected."""
    if targets and not name:  # the model itself
        return True
    if any(target.startswith(f"{name}.") for target in targets):
        return True
    if any(parameter.dim() > 1 for parameter in modules[name].parameters()):
        return False
    parent = name.rpartition(".")[0]
    if parent in selected:
        return True
    siblings = [other for other in modules if other and other.rpartition(".")[0] == parent]
    return len(siblings) > 1 and all(sibling in selected for sibling in siblings)
