"""Find and replace modules by path, ignoring wrappers of compilation and data parallelism."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

from torch import nn

COMPILED = "_orig_mod"
WRAPPED = (COMPILED, "module")
"""Names under which wrappers of compilation and data parallelism hold the model."""
WRAPPER_PACKAGES = (
    "torch._dynamo",
    "torch.nn.parallel",
    "torch.distributed",
    "torch.optim",
    "accelerate",
    "deepspeed",
)
"""Packages that define these wrappers; a child of that name in any other class is a module."""
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""Attributes of a module that hold what was registered to run around its forward and backward."""
FULL_BACKWARD = "_is_full_backward_hook"
"""Attribute of a module that records the kind of its backward hooks."""
Named = TypeVar("Named")


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return a module of the model.

    Args:
        model: with or without wrappers and adapters.
        name: plain path; an empty one is the model without its wrappers.

    Raises:
        AttributeError: there is no such module.
    """
    module = unwrapped(model)
    parts = name.split(".") if name else []
    for part in parts:
        child = getattr(module, part)
        module = _inside(child)
    return module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, with the mode and the hooks of that one.

    Hooks belong to the path: they see the inputs and outputs of whatever computes there, once per
    call. Their handles stay valid.

    Args:
        model: changed in place.
        name: plain path of the module to replace.
        module: takes its place.

    Raises:
        AttributeError: there is no module at that path.
    """
    parent, _, child = name.rpartition(".")
    replaced = module_at(model, name)
    module.train(replaced.training)
    if module is not replaced:
        _move_hooks(replaced, module)
    setattr(module_at(model, parent), child, module)


def base_attribute(part: nn.Module, name: str) -> Any:
    """Return a public attribute that the base of `part` has, such as `in_features`.

    Models read such attributes of their layers. What a library adds to a module for its own use
    starts with an underscore or `ds_`, and applies to that module alone. Methods are not passed
    on: they would compute without the update.

    Args:
        part: of an adapter.
        name: of the attribute.

    Raises:
        AttributeError: the base has no such attribute.
    """
    base = part._modules.get("base")
    if base is not None and not name.startswith(("_", "ds_")):
        for attributes in (vars(base), base._buffers):
            if name in attributes:
                return attributes[name]
        if _is_property(type(base), name):
            return getattr(base, name)
    raise AttributeError(f"{type(part).__name__} has no attribute {name!r}")


def hook_containers(module: nn.Module) -> list[Any]:
    """Return the containers of the hooks of `module` and of all modules in it."""
    containers: list[Any] = []
    for inner in module.modules():
        containers += (getattr(inner, name) for name in HOOKS)
    return containers


def clear_hooks(module: nn.Module) -> None:
    """Give `module` no hooks; containers that it had are unchanged, as another may use them."""
    for name in HOOKS:
        setattr(module, name, OrderedDict())
    setattr(module, FULL_BACKWARD, None)


def plain_name(name: str) -> str:
    """Strip what the compilation of a block adds to the paths of its modules.

    Args:
        name: path as `named_modules` yields it.
    """
    without = re.sub(rf"(^|\.){COMPILED}(?=\.|$)", "", name)
    return without.lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of compilation and data parallelism.

    A wrapper is a module of one of their classes whose only child has the name that they use.
    """
    while _is_wrapper(model):
        model = next(model.children())
    return model


def call_getter(model: nn.Module, getter: str) -> nn.Module | None:
    """Return what a getter of a Hugging Face model returns; None if the model has no such module.

    Args:
        model: of any kind.
        getter: `get_input_embeddings` or `get_output_embeddings`.
    """
    try:
        found: nn.Module | None = getattr(model, getter, lambda: None)()
    except NotImplementedError:  # transformers raises it for a model of sounds or images
        return None
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head of a Hugging Face model: a tied head must not be adapted by accident.

    If an adapter part replaces the head, the result is the original head inside that part.

    Args:
        model: of any kind; one without a head gives None.
    """
    head = call_getter(model, "get_output_embeddings")
    if head is not None and hasattr(type(head), "adapter_tensors"):
        return cast(nn.Module, head.base)
    return head


def modules_outside_language_model(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a multimodal model outside its language model, such as a vision tower.

    Hugging Face models identify the language model: their config contains its config, and
    `get_decoder` returns it.

    Args:
        model: of any kind, adapted or not.

    Returns:
        Plain path → module, without the modules inside of those; empty for a language model.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    if text is None or text() is config:
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
    """Return the modules of the model under the paths that they have without the adapter.

    Args:
        model: adapted or not, with or without wrappers.
    """
    named = unwrapped(model).named_modules()
    return dict(_without_parts(model, named))


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the model under the names that they have without the adapter.

    Tied parameters appear once.

    Args:
        model: adapted or not, with or without wrappers.
    """
    named = unwrapped(model).named_parameters()
    return dict(_without_parts(model, named))


def _is_property(cls: type[nn.Module], name: str) -> bool:
    """Return whether a class defines an attribute of this name that is not a method."""
    return hasattr(cls, name) and not callable(getattr(cls, name))


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Move the containers themselves: a handle removes its hook from the container it knows."""
    for name in (*HOOKS, FULL_BACKWARD):
        container = getattr(source, name)
        setattr(target, name, container)
    clear_hooks(source)


def _is_wrapper(model: nn.Module) -> bool:
    """Return whether a module is one of the wrappers that `unwrapped` removes."""
    children = [name for name, _ in model.named_children()]
    if len(children) != 1 or children[0] not in WRAPPED:
        return False
    packages = [cls.__module__ for cls in type(model).__mro__]
    return any(package.startswith(WRAPPER_PACKAGES) for package in packages)


def _ancestors(model: nn.Module, descendant: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that contain `descendant`, including itself."""
    for module in model.modules():
        if any(inner is descendant for inner in module.modules()):
            yield module


def _without_parts(
    model: nn.Module,
    named: Iterable[tuple[str, Named]],
) -> Iterator[tuple[str, Named]]:
    """Drop what belongs to an adapter, and drop `base` from the paths of the modules it wraps."""
    parts = {name for name, _ in adapter_parts(model)}
    for raw, value in named:
        name = plain_name(raw)
        owner = _owner(name, parts)
        if owner is None:
            yield name, value
            continue
        base = f"{owner}.base"
        if name == base or name.startswith(f"{base}."):
            path_in_base = name.removeprefix(base)
            yield f"{owner}{path_in_base}", value


def _owner(name: str, parts: set[str]) -> str | None:
    """Return the path of the part that `name` is or is inside of."""
    path = ""
    for component in name.split("."):
        path = f"{path}.{component}" if path else component
        if path in parts:
            return path
    return None


def _inside(module: nn.Module) -> nn.Module:
    """Return the module inside a compiled one, or else the module."""
    inner = module._modules.get(COMPILED)
    return module if inner is None else inner
