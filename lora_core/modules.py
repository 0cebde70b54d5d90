"""Find and replace modules by path, ignoring wrappers of compilation and data parallelism."""

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
    """Strip the prefix that the compilation of a block adds to the paths of its modules."""
    return re.sub(rf"(^|\.){COMPILED}(?=\.|$)", "", name).lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of compilation and data parallelism.

    A wrapper is a module whose only child has the name that these wrappers use.
    """
    while list(dict(model.named_children())) in ([COMPILED], ["module"]):
        model = next(model.children())
    return model


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head of a Hugging Face model: a tied head must not be adapted by accident.

    If an adapter part replaces the head, the result is the original head inside that part.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = getter() if getter is not None else None
    if head is not None and hasattr(type(head), "adapter_tensors"):
        return cast(nn.Module, head.base)
    return head


def modules_outside_language_model(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a multimodal model outside its language model, such as a vision tower.

    Keys are paths. Hugging Face models identify the language model: their config contains its
    config, and `get_decoder` returns it.
    """
    model = unwrapped(model)
    text = getattr(getattr(model, "config", None), "get_text_config", None)
    if text is None or text() is model.config:
        return {}
    language_model = model.get_decoder()  # type: ignore[operator]
    head = output_head(model)
    excluded = set(language_model.modules())
    if head is not None:
        excluded.update(head.modules())
    excluded.update(_ancestors(model, language_model))
    others: dict[str, nn.Module] = {}
    outermost: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if module in excluded:
            continue
        path = plain_name(name)
        parent = path.rpartition(".")[0]
        others[path] = module
        if parent not in others:
            outermost[path] = module
    return outermost


def adapter_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each part of an adapter and the path of the module that it replaces, in model order."""
    for name, module in unwrapped(model).named_modules():
        if hasattr(type(module), "adapter_tensors"):
            yield plain_name(name), module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the model under the paths that they have without the adapter."""
    return dict(_without_parts(model, unwrapped(model).named_modules()))


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the model under the names that they have without the adapter.

    Tied parameters appear once.
    """
    return dict(_without_parts(model, unwrapped(model).named_parameters()))


def _ancestors(model: nn.Module, descendant: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that contain `descendant`, including itself."""
    for module in model.modules():
        if any(inner is descendant for inner in module.modules()):
            yield module


def _without_parts(
    model: nn.Module, named: Iterable[tuple[str, Named]]
) -> Iterator[tuple[str, Named]]:
    """Drop what belongs to an adapter, and drop `base` from the paths of the modules it wraps."""
    parts = {name for name, _ in adapter_parts(model)}
    for raw, value in named:
        name = plain_name(raw)
        owner = _owner(name, parts)
        if owner is None:
            yield name, value
        elif name == f"{owner}.base" or name.startswith(f"{owner}.base."):
            yield owner + name.removeprefix(f"{owner}.base"), value


def _owner(name: str, parts: set[str]) -> str | None:
    """Return the path of the part that `name` is or is inside of."""
    path = ""
    for component in name.split("."):
        path = f"{path}.{component}" if path else component
        if path in parts:
            return path
    return None


def _inside(module: nn.Module) -> nn.Module:
    inner = module._modules.get(COMPILED)
    return module if inner is None else inner
