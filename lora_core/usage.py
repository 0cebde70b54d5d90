"""Which trained tensors of an adapter take part in what a model computes.

A model can contain a layer and never use it: it was built for another task, or its parent keeps a
reference to the weight, passes the stored weight to a fused kernel, or computes without the layer.
An update of such a layer has no effect, and no file or shape shows that. One forward and backward
pass does: a tensor that takes part gets a gradient, even one of zeros.

Experts are the exception: one that no token of the batch was routed to is not called. Their paths
have a number after that of their block.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_core.errors import TargetError
from lora_core.modules import adapter_parts

EXAMPLES = 3
"""How many tensors a message names."""
LISTED = 40
"""How many modules a message lists to be excluded."""
EXPERT = re.compile(r"(^|\.)\d+\..*\.\d+(\.|$)")
"""Found in a path with a number after that of its block."""


def check_used(model: nn.Module, run_once: Callable[[], Tensor]) -> None:
    """Raise if a trained tensor of the adapter takes no part in the model's computation.

    Gradients that `model` has are unchanged. Call it on the model itself, not on a wrapper that
    exchanges gradients between processes.

    Args:
        model: carries an adapter.
        run_once: runs one batch through `model` and returns the loss or the output, of any shape.

    Raises:
        TargetError: there are such tensors.
    """
    unused = unused_tensors(model, run_once)
    if unused:
        examples = ", ".join(unused[:EXAMPLES])
        raise TargetError(
            f"{len(unused)} trained tensors take no part in what the model computes, such as "
            f"{examples}: the model does not use these layers, or reads their stored weights; "
            "name them in exclude_modules, or merge the adapter before use"
        )


def refuse_unused_layers(model: nn.Module, without_gradient: Collection[str]) -> None:
    """Raise if no trained tensor of a layer got a gradient from several examples.

    Layers whose paths have a number after that of their block are accepted: they may be experts
    that no token of the examples was routed to.

    Args:
        model: carries an adapter.
        without_gradient: names of parameters of `model` that are trained and got no gradient, not
            even one of zeros.

    Raises:
        TargetError: there are such layers.
    """
    unused = [path for path in _layers_of(model, without_gradient) if not EXPERT.search(path)]
    if unused:
        listed = ", ".join(unused[:LISTED])
        if len(unused) > LISTED:
            listed += f" and {len(unused) - LISTED} more"
        raise TargetError(
            f"{len(unused)} adapted layers take no part in what the model computes, so training "
            f"does not change them: {listed}; the model does not use them for these examples, or "
            "reads their stored weights instead of calling them; name them in exclude_modules, or "
            "choose targets that do not match them"
        )


def unused_tensors(model: nn.Module, run_once: Callable[[], Tensor]) -> list[str]:
    """Return the trained tensors that get no gradient from one pass, in model order.

    Names are module paths followed by PEFT's name of the tensor; for arguments, see `check_used`.

    Raises:
        TargetError: `model` carries no adapter, or the result of `run_once` has no gradient at all.
    """
    trained = _trained_tensors(model)
    if not trained:
        raise TargetError("the model carries no trained adapter; inject one before this check")
    with _gradients_set_aside(model), torch.enable_grad():
        output = run_once()
        if not output.requires_grad:
            raise TargetError(
                "the result of run_once depends on no trained tensor: the model uses no adapted "
                "layer, or run_once disables gradients; enable them, or choose other targets"
            )
        output.sum().backward()
        return [name for name, parameter in trained.items() if parameter.grad is None]


def _layers_of(model: nn.Module, names: Collection[str]) -> Iterator[str]:
    """Yield the paths of the parts of which all trained parameters are in `names`."""
    chosen = set(names)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, part in adapter_parts(model):
        trained = [named[id(one)] for one in part.parameters() if one.requires_grad]
        if trained and chosen.issuperset(trained):
            yield path


def _trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    trained: dict[str, nn.Parameter] = {}
    for path, part in adapter_parts(model):
        tensors: dict[str, nn.Parameter] = part.adapter_tensors()  # type: ignore[operator]
        for name, parameter in tensors.items():
            if parameter.requires_grad:
                trained[f"{path}.{name}"] = parameter
    return trained


@contextmanager
def _gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Let the block start without gradients, and restore those of before at its end."""
    parameters = list(model.parameters())
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
