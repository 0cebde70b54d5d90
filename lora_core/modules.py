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
    """Return the module at the plain path `name`."""
    module = unwrapped(model)
    for part in name.split(".") if name else []:
        module = _inside(getattr(module, part))
    return module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the plain path `name`, with the mode and the hooks of the module there.

    Hooks belong to the path: they see the inputs and outputs of whatever computes there, once per
    call. Their handles stay valid.
    """
    parent, _, child = name.rpartition(".")
    replaced = module_at(model, name)
    module.train(replaced.training)
    if module is not replaced:
        _move_hooks(replaced, module)
    setattr(module_at(model, parent), child, module)


def base_attribute(part: nn.Module, name: str) -> Any:
    """Return a public attribute that the base of `part` has itself, such as `in_features`.

    Models read such attributes of their layers. What a library adds to a module for its own use
    starts with an underscore or `ds_`, and applies to that module alone.

    Raises:
        AttributeError: the base has no such attribute.
    """
    base = part._modules.get("base")
    if base is not None and not name.startswith(("_", "ds_")):
        for attributes in (vars(base), base._buffers):
            if name in attributes:
                return attributes[name]
    raise AttributeError(f"{type(part).__name__} has no attribute {name!r}")


def hook_containers(module: nn.Module) -> list[Any]:
    """Return the containers of the hooks of `module` and of all modules in it."""
    return [getattr(inner, name) for inner in module.modules() for name in HOOKS]


def clear_hooks(module: nn.Module) -> None:
    """Give `module` no hooks; containers that it had are unchanged, as another may use them."""
    for name in HOOKS:
        setattr(module, name, OrderedDict())
    setattr(module, FULL_BACKWARD, None)


def plain_name(name: str) -> str:
    """Strip the prefix that the compilation of a block adds to the paths of its modules."""
    return re.sub(rf"(^|\.){COMPILED}(?=\.|$)", "", name).lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of compilation and data parallelism.

    A wrapper is a module of one of their classes whose only child has the name that they use.
    """
    while _is_wrapper(model):
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


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Move the containers themselves: a handle removes its hook from the container it knows."""
    for name in (*HOOKS, FULL_BACKWARD):
        setattr(target, name, getattr(source, name))
    clear_hooks(source)


def _is_wrapper(model: nn.Module) -> bool:
    names = [name for name, _ in model.named_children()]
    if len(names) != 1 or names[0] not in WRAPPED:
        return False
    return any(cls.__module__.startswith(WRAPPER_PACKAGES) for cls in type(model).__mro__)


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
