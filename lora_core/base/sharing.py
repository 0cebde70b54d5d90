"""Weights that several modules share, such as a tied output head, and the config flag for them.

A tie is a matter of memory: two parameters are one weight if they read the same bytes in the same
order, whether they are one object or two.

transformers records ties in `tie_word_embeddings`, one flag for every tie of a model. If it is
false, transformers saves each untied weight separately and expects each one when it loads.
Therefore the flag changes only if no tie is left; while one is, transformers (from 5 on) compares
what it loads and does not tie weights that differ. Encoder-decoder models always keep the flag:
T5-like models scale their logits by it.
"""

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_core.modules import call_getter

FLAG = "tie_word_embeddings"


class Slot(NamedTuple):
    """A module and the name of a parameter that it has directly."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner.get_parameter(self.name)


def slots(module: nn.Module) -> Iterator[Slot]:
    """Yield every slot in `module`; a tied parameter has several."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield Slot(owner, name)


def memory_of(parameter: Any) -> Hashable:
    """Return a key that two parameters share exactly if they are one weight.

    A parameter without memory has a unique key.
    """
    address = parameter.data_ptr() if parameter.numel() else 0
    if not address:
        return id(parameter)
    return (parameter.device, address, parameter.dtype, parameter.shape, parameter.stride())


def is_head_tied(model: nn.Module) -> bool:
    """Return whether a Hugging Face model's output head shares the embedding's weight.

    The model can be adapted or not.
    """
    head = _without_adapter(call_getter(model, "get_output_embeddings"))
    embedding = _without_adapter(call_getter(model, "get_input_embeddings"))
    head_weight = getattr(head, "weight", None)
    embedding_weight = getattr(embedding, "weight", None)
    if head is embedding or not isinstance(head_weight, Tensor):
        return False
    if not isinstance(embedding_weight, Tensor):
        return False
    return memory_of(head_weight) == memory_of(embedding_weight)


def models_of_tied_heads(model: nn.Module) -> list[nn.Module]:
    """Return the modules in `model` whose head is tied and whose config sets the flag."""
    found: list[nn.Module] = []
    for module in model.modules():
        flag = getattr(getattr(module, "config", None), FLAG, None)
        if flag is True and is_head_tied(module):
            found.append(module)
    return found


def configs_to_untie(models: list[nn.Module]) -> tuple[Any, ...]:
    """Return the configs of `models`, tied before, whose flag is now wrong: nothing is shared."""
    found: dict[int, Any] = {}
    for model in models:
        if getattr(model.config, "is_encoder_decoder", False) or _shares_any(model):
            continue
        for config in (model.config, getattr(model.config, "text_config", None)):
            if getattr(config, FLAG, None) is True:
                found[id(config)] = config
    return tuple(found.values())


def _shares_any(model: nn.Module) -> bool:
    users = Counter(memory_of(slot.parameter) for slot in slots(model))
    return any(count > 1 for count in users.values())


def _without_adapter(module: nn.Module | None) -> nn.Module | None:
    """Return the base module if `module` is a part of an adapter, else `module`."""
    if hasattr(type(module), "adapter_tensors"):
        return module.base  # type: ignore[return-value, union-attr]
    return module
