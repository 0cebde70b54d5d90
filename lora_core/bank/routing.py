"""Which rows of a batch, or segments of a pack, belong to which adapter, and which tokens they are.

A module inside a model sees its input in one of two layouts: rows (B, T, …) or, in a mixture of
experts, the flattened tokens of all rows, (B·T, …).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_core.errors import RoutingError

BATCH, TOKENS = 0, 1
"""Dimensions that can be routed: examples of a batch, or tokens of a pack (1, T, …)."""


@dataclass(frozen=True)
class Rows:
    """The rows of one adapter, on the device where they are used.

    Shapes: n rows, each with any number of tokens; N tokens in all of them; F features.
    """

    dim: int
    """BATCH or TOKENS."""
    indices: Tensor
    """(n,) of int64, ascending."""
    start: int | None
    """The first index if all are consecutive, so that reading copies no row; else None."""

    def of(self, x: Tensor) -> Tensor:
        """Return these rows of `x`, as a view if they are consecutive.

        Args:
            x: all rows along `dim`.
        """
        if self.start is None:
            return x.index_select(self.dim, self.indices)
        return x.narrow(self.dim, self.start, len(self.indices))

    def add_to(self, total: Tensor, own: Tensor) -> None:
        """Add a matrix to these rows of `total`, in place.

        Args:
            total: (…, F), all rows along `dim`.
            own: (N, F), one line per token.
        """
        shape = list(total.shape)
        shape[self.dim] = len(self.indices)
        addend = own.view(shape)
        if self.start is None:
            total.index_add_(self.dim, self.indices, addend)
        else:
            self.of(total).add_(addend)


@dataclass(frozen=True)
class Routing:
    """Which rows belong to which adapter."""

    dim: int
    """BATCH or TOKENS."""
    indices: Mapping[str, Tensor]
    """Adapter → its rows, (n,) of int64, ascending; all other rows belong to the base."""
    length: int
    """Total number of rows."""
    _rows: dict[tuple[str, torch.device], Rows] = field(
        default_factory=dict,
        init=False,
        repr=False,
        compare=False,
    )
    """Adapter and device → its rows there: a cache."""

    def rows(self, name: str, device: torch.device) -> Rows:
        """Return the rows of an adapter; they are copied to each device once.

        Args:
            name: an adapter of `indices`.
            device: of the inputs.
        """
        key = (name, device)
        if key not in self._rows:
            indices = self.indices[name]
            first = int(indices[0])
            last = int(indices[-1])
            is_consecutive = last - first == len(indices) - 1
            start = first if is_consecutive else None
            self._rows[key] = Rows(self.dim, indices.to(device), start)
        return self._rows[key]

    def check(self, x: Tensor) -> None:
        """Refuse an input whose layout does not match the routing.

        Args:
            x: the input of a module, with its rows along `dim`.

        Raises:
            RoutingError: `x` has another number of rows.
        """
        found = x.shape[self.dim] if x.dim() > self.dim else 0
        if found != self.length:
            raise RoutingError(
                f"the routing names {self.length} rows, but dimension {self.dim} of an input of "
                f"shape {tuple(x.shape)} has {found}; name an adapter, or None, for every row"
            )

    def check_features(self, x: Tensor) -> None:
        """Refuse an input that `check` refuses, or whose features are in the routed dimension.

        Args:
            x: the input of a module that reads features, (…, F).

        Raises:
            RoutingError: `x` has another number of rows, or too few dimensions.
        """
        if x.dim() <= self.dim + 1:
            raise RoutingError(
                f"rows are routed along dimension {self.dim}, but an input of shape "
                f"{tuple(x.shape)} has its features there; route along the batch instead, or leave "
                "this module out of the adapters"
            )
        self.check(x)

    def tokens(self, name: str, count: int, device: torch.device) -> Tensor:
        """Return the indices of an adapter's tokens among the flattened tokens of all rows.

        Args:
            name: an adapter of `indices`.
            count: number of flattened tokens, B·T.
            device: of the result.

        Returns:
            (N,) of int64.

        Raises:
            RoutingError: `count` is not a multiple of the number of routed rows.
        """
        other, rest = divmod(count, self.length)
        if rest:
            raise RoutingError(
                f"the routing names {self.length} rows, but {count} tokens are not a multiple of "
                "that; name every row once"
            )
        rows = self.rows(name, device).indices
        others = torch.arange(other, device=device)
        if self.dim == BATCH:
            first_of_row = rows[:, None] * other
            indices = first_of_row + others
        else:
            first_of_example = others[:, None] * self.length
            indices = first_of_example + rows
        return indices.flatten()


def routing(
    names: Sequence[str | None],
    *,
    dim: int = BATCH,
    lengths: Sequence[int] | None = None,
) -> Routing:
    """Return the routing of rows to the adapters with these names.

    Args:
        names: for each row or segment, its adapter; None is the base alone.
        dim: BATCH or TOKENS.
        lengths: rows in each segment; 1 each if omitted.

    Raises:
        RoutingError: no row is given, the dimension cannot be routed, or names and lengths differ
            in number.
    """
    if lengths is None:
        lengths = [1] * len(names)
    if dim not in (BATCH, TOKENS):
        raise RoutingError(
            f"rows cannot be routed along dimension {dim}; use BATCH (0) or TOKENS (1)"
        )
    _check_lengths(lengths, len(names))
    rows: dict[str, list[int]] = {}
    total = 0
    for name, length in zip(names, lengths, strict=True):
        end = total + length
        if name is not None and length:
            own = rows.setdefault(name, [])
            own.extend(range(total, end))
        total = end
    indices = {name: torch.tensor(own) for name, own in rows.items()}
    return Routing(dim, indices, total)


def _check_lengths(lengths: Sequence[int], name_count: int) -> None:
    is_any_negative = any(length < 0 for length in lengths)
    if len(lengths) != name_count or is_any_negative or not sum(lengths):
        raise RoutingError(
            f"lengths={list(lengths)} do not fit {name_count} names; give one for each, none below "
            "0 and not all 0"
        )
