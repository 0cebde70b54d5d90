"""The spectra of an adapter's updates: a strip per kind of module, with a column per layer.

A cell is σᵢ/σ₁ of one update, the strongest direction on top, in discrete shades. A line shows the
effective rank, and bars above the cells show ‖ΔW‖ relative to the largest of the adapter. Values
decrease down a column, so each shade is one run of cells and a strip of any rank is a few paths.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.runtime.interfaces.results import ModuleSpectrum

SHADES = 8
ShadeRun = tuple[int, int]
"""The first cell of a shade in a column, and the number of its cells."""


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
    intruders: int | None
    """Intruder dimensions, summed over the layers in which they were counted; None if in none."""
    counted_layers: int
    """In how many layers they were counted."""


def strips(modules: Sequence[ModuleSpectrum]) -> list[Strip]:
    """Return a strip for each kind of module of one adapter, in the order of the model."""
    kinds: dict[str, list[ModuleSpectrum]] = {}
    for module in modules:
        kind = re.sub(r"\d+", "", module.module)
        kinds.setdefault(kind, []).append(module)
    largest = max(map(_size, modules), default=0.0) or 1.0
    return [_strip(group, largest) for group in kinds.values()]


def _strip(group: Sequence[ModuleSpectrum], largest: float) -> Strip:
    columns = []
    effective_ranks = []
    points = []
    bars = []
    intruders = [module.intruders for module in group if module.intruders is not None]
    for index, module in enumerate(group):
        height = _size(module) / largest
        columns.append(module.values)
        effective_ranks.append(module.effective_rank)
        points.append(f"{index + 0.5:g},{module.effective_rank:.2f}")
        bars.append(f"M{index + 0.1:g} 1h.8v-{height:.3f}h-.8z")
    return Strip(
        kind=group[0].module.rpartition(".")[2],
        layers=len(group),
        rank=max(map(len, columns)),
        shades=_shades(columns),
        line=" ".join(points),
        bars="".join(bars),
        effective_rank=sum(effective_ranks) / len(effective_ranks),
        lowest=min(effective_ranks),
        highest=max(effective_ranks),
        intruders=sum(intruders) if intruders else None,
        counted_layers=len(intruders),
    )


def _shades(columns: Sequence[Sequence[float]]) -> dict[int, str]:
    """Return shade → the path of its cells in all columns."""
    paths: dict[int, str] = {}
    for index, values in enumerate(columns):
        for shade, (top, height) in _runs(values).items():
            path = paths.get(shade, "")
            paths[shade] = f"{path}M{index} {top}h1v{height}h-1z"
    return dict(sorted(paths.items()))


def _runs(values: Sequence[float]) -> dict[int, ShadeRun]:
    """Return the run of each shade; empty for an update of zero."""
    strongest = max(values, default=0.0)
    if not strongest:
        return {}
    levels = [round(SHADES * value / strongest) for value in values]
    runs = {}
    for shade in dict.fromkeys(levels):
        if shade:
            runs[shade] = (levels.index(shade), levels.count(shade))
    return runs


def _size(module: ModuleSpectrum) -> float:
    return math.hypot(*module.values)
