"""The spectra of an adapter's updates: for each kind of module a strip, with a column for each of its layers.

A cell is σᵢ/σ₁ of one update, the strongest direction on top, in steps of shade; a line follows the effective rank, and
bars above give ‖ΔW‖ beside the largest of the adapter. Values fall down a column, so a shade is one run of cells and a
strip of any rank is a few paths.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHADES = 8
Module = Mapping[str, Any]


@dataclass(frozen=True)
class Strip:
    """The updates of one kind of module, in units of one layer and one direction."""

    kind: str
    layers: int
    rank: int
    """Directions of the largest update."""
    shades: Mapping[int, str]
    """Shade, 1 to SHADES → the path of its cells."""
    line: str
    """Points of the effective rank."""
    bars: str
    """The path of the sizes, in a box of height 1."""
    effective_rank: float
    """Mean over the layers."""
    lowest: float
    highest: float


def strips(modules: Sequence[Module]) -> list[Strip]:
    """Return a strip for each kind of module of one adapter, in the order of the model."""
    kinds: dict[str, list[Module]] = {}
    for module in modules:
        kinds.setdefault(re.sub(r"\d+", "", module["module"]), []).append(module)
    largest = max((_size(module) for module in modules), default=0.0) or 1.0
    return [_strip(group, largest) for group in kinds.values()]


def _strip(group: Sequence[Module], largest: float) -> Strip:
    effective = [float(module["effective_rank"]) for module in group]
    return Strip(
        kind=group[0]["module"].rpartition(".")[2],
        layers=len(group),
        rank=max(len(module["values"]) for module in group),
        shades=_shades([module["values"] for module in group]),
        line=" ".join(f"{place + 0.5:g},{value:.2f}" for place, value in enumerate(effective)),
        bars="".join(
            f"M{place + 0.1:g} 1h.8v-{_size(module) / largest:.3f}h-.8z"
            for place, module in enumerate(group)
        ),
        effective_rank=sum(effective) / len(effective),
        lowest=min(effective),
        highest=max(effective),
    )


def _shades(columns: Sequence[Sequence[float]]) -> dict[int, str]:
    paths: dict[int, str] = {}
    for place, values in enumerate(columns):
        for shade, (top, height) in _runs(values).items():
            paths[shade] = paths.get(shade, "") + f"M{place} {top}h1v{height}h-1z"
    return dict(sorted(paths.items()))


def _runs(values: Sequence[float]) -> dict[int, tuple[int, int]]:
    """Return shade → its first cell and how many there are; nothing for an update of zero."""
    strongest = max(values, default=0.0)
    levels = [round(SHADES * value / strongest) if strongest else 0 for value in values]
    return {
        shade: (levels.index(shade), levels.count(shade))
        for shade in dict.fromkeys(levels)
        if shade
    }


def _size(module: Module) -> float:
    return math.hypot(*module["values"])
