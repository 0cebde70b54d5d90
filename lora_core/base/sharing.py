"""Weights that several modules share, such as the output head that is the embedding, and what a model's config says of them.

A tie is a matter of memory: two parameters are one weight where they read the same bytes in the same order, whether they
are one object or two.

transformers notes ties in `tie_word_embeddings`, one word for every tie of a model. Told that there is none, it saves
each weight that lies apart and looks for each when it loads. So the word is changed only where no tie is left; while one
is, transformers (from 5 on) compares what it loads, and leaves apart what differs. Models of two stacks keep the word in
any case: those of T5's kind scale their logits by it.
"""

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

FLAG = "tie_word_embeddings"


class Slot(NamedTuple):
    """A place where a module holds a parameter of its own."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner.get_parameter(self.name)


def slots(module: nn.Module) -> Iterator[Slot]:
    """Yield every place in `module` that holds a parameter; a tied one has several."""
    for owner in module.modules():
        yield from (
            Slot(owner, name)
            for name, parameter in owner._parameters.items()
            if parameter is not None
        )


def memory_of(parameter: Any) -> Hashable:
    """Return what two parameters have in common exactly when they are one weight; without memory, each is its own."""
    place = parameter.data_ptr() if parameter.numel() else 0
    return (
        (parameter.device, place, parameter.dtype, parameter.shape, parameter.stride())
        if place
        else id(parameter)
    )


def is_head_tied(model: nn.Module) -> bool:
    """Tell whether the output head of a Hugging Face model, adapted or not, has the weight of the embedding."""
    head, embedding = (
        _plain(_asked(model, f"get_{which}_embeddings")) for which in ("output", "input")
    )
    weights = [getattr(module, "weight", None) for module in (head, embedding)]
    if head is embedding or not all(isinstance(weight, Tensor) for weight in weights):
        return False
    return memory_of(weights[0]) == memory_of(weights[1])


def models_of_tied_heads(model: nn.Module) -> list[nn.Module]:
    """Return the modules in `model` whose head is tied and whose config says so."""
    return [
        module
        for module in model.modules()
        if getattr(getattr(module, "config", None), FLAG, None) is True and is_head_tied(module)
    ]


def configs_to_untie(models: list[nn.Module]) -> tuple[Any, ...]:
    """Return the configs that no longer say what is: of those `models`, tied before, in which no weight is shared now."""
    stale = [
        m.config
        for m in models
        if not getattr(m.config, "is_encoder_decoder", False) and not _shares_any(m)
    ]
    nested = [getattr(config, "text_config", None) for config in stale]
    found = {
        id(config): config for config in (*stale, *nested) if getattr(config, FLAG, None) is True
    }
    return tuple(found.values())


def _shares_any(model: nn.Module) -> bool:
    return any(
        users > 1 for users in Counter(memory_of(slot.parameter) for slot in slots(model)).values()
    )


def _asked(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(model, getter, lambda: None)()
    except NotImplementedError:  # how transformers says that a model has no embedding
        return None
    return found


def _plain(module: nn.Module | None) -> nn.Module | None:
    """Return the module under a part of an adapter."""
    return module.base if hasattr(type(module), "adapter_tensors") else module  # type: ignore[return-value, union-attr]
