"""The matrix products of a training step, recorded and then computed alone."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.mm.out: torch.mm,
    torch.ops.aten.bmm.default: torch.bmm,
    torch.ops.aten.addmm.default: lambda _, a, b: torch.mm(a, b),
    torch.ops.aten.addmm_.default: lambda _, a, b: torch.mm(a, b),
}
"""Operations of ATen → the product in them. Products inside PyTorch's attention kernels are not
counted, so that their share is at least what is found."""
REPETITIONS = 3
Product = tuple[Callable[..., Tensor], list[Tensor]]


class Recorder(TorchDispatchMode):
    """Records the shapes, strides and dtypes of the products inside its block."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Callable[..., Tensor], list[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        product = PRODUCTS.get(func)
        if product is not None:
            operands = [argument for argument in args if isinstance(argument, Tensor)]
            self.products.append((product, [_layout(operand) for operand in operands]))
        return func(*args, **(kwargs or {}))

    def seconds(self) -> float:
        """Compute the recorded products on random numbers; return the median duration of all."""
        operands: dict[Any, Tensor] = {}
        calls: list[Product] = []
        for product, layouts in self.products:
            for layout in layouts:
                if layout not in operands:
                    operands[layout] = _random(*layout)
            calls.append((product, [operands[layout] for layout in layouts]))
        durations = []
        for _ in range(REPETITIONS):
            started = time.perf_counter()
            for product, tensors in calls:
                product(*tensors)
            durations.append(time.perf_counter() - started)
        return median(durations)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _random(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty_strided(shape, stride, dtype=dtype)
    return tensor.copy_(torch.randn(shape))
