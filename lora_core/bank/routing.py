"""Which rows of a batch, or stretches of a pack, belong to which adapter, and the tokens that these rows are.

A module inside a model sees its input in one of two layouts: rows (B, T, …), or, in a mixture of experts, the tokens of
all rows one after the other, (B·T, …).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_core.errors import RoutingError

BATCH, TOKENS = 0, 1
"""Dimensions that rows may lie along: examples of a batch, or tokens of a pack (1, T, …)."""


@dataclass(frozen=True)
class Rows:
    """The rows of one adapter, on the device where they are asked for."""

    dim: int
    """BATCH or TOKENS."""
    places: Tensor
    """(n,) of int64, rising."""
    start: int | None
    """The first place where each follows the one before, so that no row has to be copied to be read."""

    def of(self, x: Tensor) -> Tensor:
        """Return these rows of `x`, as a view where they lie together."""
        return (
            x.index_select(self.dim, self.places)
            if self.start is None
            else x.narrow(self.dim, self.start, len(self.places))
        )

    def add_to(self, whole: Tensor, own: Tensor) -> None:
        """Add a matrix (N, F), a line for each token of these rows, to these rows of `whole` (…, F), in place."""
        shape = [
            len(self.places) if place == self.dim else size
            for place, size in enumerate(whole.shape)
        ]
        if self.start is None:
            whole.index_add_(self.dim, self.places, own.view(shape))
        else:
            self.of(whole).add_(own.view(shape))


@dataclass(frozen=True)
class Routing:
    """Which rows belong to which adapter."""

    dim: int
    """BATCH or TOKENS."""
    places: Mapping[str, Tensor]
    """Adapter → its rows, (n,) of int64, rising; a row that is nobody's is the base's."""
    length: int
    """Rows in all."""
    _rows: dict[tuple[str, torch.device], Rows] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def rows(self, name: str, device: torch.device) -> Rows:
        """Return the rows of an adapter for inputs on `device`, where they are sent once."""
        if (name, device) not in self._rows:
            places = self.places[name]
            start = int(places[0]) if int(places[-1] - places[0]) == len(places) - 1 else None
            self._rows[name, device] = Rows(self.dim, places.to(device), start)
        return self._rows[name, device]

    def check(self, x: Tensor) -> None:
        """Refuse an input that is not laid out as the routing says."""
        found = x.shape[self.dim] if x.dim() > self.dim else 0
        if found != self.length:
            raise RoutingError(
                f"the routing names {self.length} rows and dimension {self.dim} of an input of shape {tuple(x.shape)} has "
                f"{found}; name an adapter, or None, for every row"
            )

    def check_features(self, x: Tensor) -> None:
        """Refuse the same, and an input whose rows would lie along its features."""
        if x.dim() <= self.dim + 1:
            raise RoutingError(
                f"rows lie along dimension {self.dim} and an input of shape {tuple(x.shape)} holds its features there; "
                "route along the batch instead, or leave this module out of the adapters"
            )
        self.check(x)

    def tokens(self, name: str, count: int, device: torch.device) -> Tensor:
        """Return the places of an adapter's tokens among the `count` tokens of a batch laid flat, (B·T, …).

        Raises:
            RoutingError: so many tokens are no batch of the rows that the routing names.
        """
        other, rest = divmod(count, self.length)
        if rest:
            raise RoutingError(
                f"the routing names {self.length} rows and {count} tokens are no multiple of that; name every row once"
            )
        rows, others = self.rows(name, device).places, torch.arange(other, device=device)
        if self.dim == BATCH:
            return (rows[:, None] * other + others).flatten()
        return (others[:, None] * self.length + rows).flatten()


def routing(
    names: Sequence[str | None], *, dim: int = BATCH, lengths: Sequence[int] | None = None
) -> Routing:
    """Return the routing of rows that bear these names.

    Args:
        names: for each row, or each stretch, its adapter; None is the base alone.
        dim: BATCH or TOKENS.
        lengths: rows in each stretch; one where it is left out.

    Raises:
        RoutingError: there is no row, a dimension that rows do not lie along, or not one length for each name.
    """
    lengths = [1] * len(names) if lengths is None else lengths
    if dim not in (BATCH, TOKENS):
        raise RoutingError(f"rows cannot lie along dimension {dim}; use BATCH (0) or TOKENS (1)")
    if len(lengths) != len(names) or any(length < 0 for length in lengths) or not sum(lengths):
        raise RoutingError(
            f"lengths={list(lengths)} do not fit {len(names)} names; give one for each, none below 0 and not all 0"
        )
    spread = [name for name, count in zip(names, lengths, strict=True) for _ in range(count)]
    present = dict.fromkeys(name for name in spread if name is not None)
    places = {
        name: torch.tensor([place for place, one in enumerate(spread) if one == name])
        for name in present
    }
    return Routing(dim, places, len(spread))
