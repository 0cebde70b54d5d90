"""Find and replace modules by path, whatever compilation and data parallelism have put around the model or its blocks."""

import re
from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

from torch import nn

COMPILED = "_orig_mod"
Named = TypeVar("Named")


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the module at the plain path `name`."""
    module = unwrapped(model)
    for part in name.split(".") if name else []:
        module = _inside(getattr(module, part))
    return module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the plain path `name`, keeping its mode of training or evaluation."""
    parent, _, child = name.rpartition(".")
    module.train(module_at(model, name).training)
    setattr(module_at(model, parent), child, module)


def plain_name(name: str) -> str:
    """Strip what the compilation of a block puts into the paths of its modules."""
    return re.sub(rf"(^|\.){COMPILED}(?=\.|$)", "", name).lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model under what compilation and data parallelism put around it: a module of one child of their name."""
    while list(dict(model.named_children())) in ([COMPILED], ["module"]):
        model = next(model.children())
    return model


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head: Hugging Face models name theirs, and a tied head must never be adapted by accident.

    Under an adapter too it is the model's own: what stands in its place is no head of a plan.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = getter() if getter is not None else None
    return (
        cast(nn.Module, head.base)
        if head is not None and hasattr(type(head), "adapter_tensors")
        else head
    )


def modules_outside_language_model(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a multimodal model that are not part of its language model, such as a vision tower, by path.

    Hugging Face models identify it: their config contains that of the language model, and `get_decoder` returns the model.
    """
    model = unwrapped(model)
    text = getattr(getattr(model, "config", None), "get_text_config", None)
    if text is None or text() is model.config:
        return {}
    language, head = model.get_decoder(), output_head(model)  # type: ignore[operator]
    inside = {
        id(module) for part in (language, head) if part is not None for module in part.modules()
    }
    around = {
        id(module)
        for module in model.modules()
        if any(inner is language for inner in module.modules())
    }
    own = inside | around
    others = {
        plain_name(name): module for name, module in model.named_modules() if id(module) not in own
    }
    return {
        name: module for name, module in others.items() if name.rpartition(".")[0] not in others
    }


def adapter_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each part of an adapter with the path of the module in whose place it stands, in model order."""
    for name, module in unwrapped(model).named_modules():
        if hasattr(type(module), "adapter_tensors"):
            yield plain_name(name), module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that the model has without an adapter, under the paths they have without it."""
    return dict(_without_parts(model, unwrapped(model).named_modules()))


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the model has without an adapter, under the names they have without it; tied ones once."""
    return dict(_without_parts(model, unwrapped(model).named_parameters()))


def _without_parts(
    model: nn.Module, named: Iterable[tuple[str, Named]]
) -> Iterator[tuple[str, Named]]:
    """Leave out what belongs to an adapter, and the `base` from the paths of what lies under one."""
    parts = {name for name, _ in adapter_parts(model)}
    for raw, value in named:
        name = plain_name(raw)
        owner = _owner(name, parts)
        if owner is None:
            yield name, value
        elif name == f"{owner}.base" or name.startswith(f"{owner}.base."):
            yield owner + name.removeprefix(f"{owner}.base"), value


def _owner(name: str, parts: set[str]) -> str | None:
    """Return the path of the part that `name` is or lies in."""
    steps = name.split(".")
    return next(
        (path for path in (".".join(steps[:n]) for n in range(1, len(steps) + 1)) if path in parts),
        None,
    )


def _inside(module: nn.Module) -> nn.Module:
    inner = module._modules.get(COMPILED)
    return module if inner is None else inner
