"""Comparisons of tensors that raise Wrong, and the warnings of this library."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from parity.features import parts_of_largest
from parity.matrix.outcome import Wrong
from torch import Tensor, nn

Bits = Mapping[str, Tensor]


@torch.no_grad()
def bits_of(model: nn.Module) -> Bits:
    """Return copies of all tensors of a model."""
    return {name: value.clone() for name, value in model.state_dict().items() if _is_tensor(value)}


def equal_bits(found: Bits, expected: Bits) -> bool:
    """Return whether two sets of tensors are the same, bit for bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def require_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise Wrong if two tensors differ by more than a fraction of the largest entry."""
    if found.shape != expected.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    difference = parts_of_largest(found, expected)
    if not difference <= tolerance:
        raise Wrong(f"{what} differ by {difference:.2g} of the largest; allowed {tolerance:g}")


def require_equal(what: str, found: Bits, expected: Bits) -> None:
    """Raise Wrong if two sets of tensors differ, naming the first difference."""
    other = sorted(found.keys() ^ expected.keys())
    if other:
        raise Wrong(f"{what}: {len(other)} keys are in one of the two only, such as {other[0]}")
    for name, tensor in expected.items():
        if not torch.equal(found[name].cpu(), tensor.cpu()):
            raise Wrong(f"{what}: {name} differs")


@contextmanager
def logged() -> Iterator[list[str]]:
    """Yield a list to which the warnings that this library logs inside the block are added."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lora_core")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
