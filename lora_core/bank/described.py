"""What models read of the base's modules while rows are routed to several adapters.

A model can read the size of a layer, or the dtype of its weight, as T5 does before `wo`. It can
also compute with the weight instead of calling the layer. Then no one weight is right for all rows,
so a product with it raises an error instead of missing their updates.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_core.errors import RoutingError
from lora_core.modules import base_attribute

DESCRIPTIONS = frozenset(
    {
        Tensor.dim,
        Tensor.is_complex,
        Tensor.is_floating_point,
        Tensor.numel,
        Tensor.size,
        Tensor.stride,
    }
)
"""Methods that read no value of a tensor."""
GETTERS = ("device", "dtype", "is_cuda", "is_meta", "itemsize", "layout", "ndim", "shape")
"""Attributes that read no value of a tensor."""


class DescribedWeight(Tensor):
    """A weight with its dtype, device and shape, whose values cannot be used."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Read a description; raise RoutingError for everything else."""
        if func in _ALLOWED:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        raise RoutingError(
            f"{getattr(func, '__name__', func)} uses the weight of a layer that several adapters "
            "update, each for its own rows, so no one weight is right; compute each adapter's rows "
            "alone with Bank.using"
        )


_ALLOWED = DESCRIPTIONS | {getattr(Tensor, name).__get__ for name in GETTERS}


def described_attribute(part: nn.Module, name: str) -> Any:
    """Return what models read of the base of `part`, without values of its parameters.

    Raises:
        AttributeError: the base has no such attribute.
    """
    base = part._modules["base"]
    assert base is not None
    if name not in base._parameters:
        return base_attribute(part, name)
    stored = base._parameters[name]
    return None if stored is None else stored.detach().as_subclass(DescribedWeight)
