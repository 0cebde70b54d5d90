"""The paths of a strip encode the spectra that it was built from."""

import math
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given
from summaries import spectrum

from pipelines.reporting.plots.strips import SHADES, Strip, strips
from pipelines.runtime.interfaces.results import ModuleSpectrum

SINGULAR_VALUES = st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=9).map(
    lambda values: sorted(values, reverse=True)
)


def shades_of(strip: Strip) -> list[list[int]]:
    """Return the shade of each cell, column by column, read from the strip's paths."""
    cells = [[0] * strip.rank for _ in range(strip.layers)]
    for shade, path in strip.shades.items():
        for match in re.findall(r"M(\d+) (\d+)h1v(\d+)h-1z", path):
            column, top, height = map(int, match)
            for index in range(top, top + height):
                assert cells[column][index] == 0, "a cell is painted twice"
                cells[column][index] = shade
    return cells


@given(st.lists(SINGULAR_VALUES, min_size=1, max_size=5))
def test_shades_are_the_values_within_half_a_shade(columns: list[list[float]]) -> None:
    modules = []
    for index, values in enumerate(columns):
        modules.append(
            ModuleSpectrum(
                module=f"layers.{index}.q_proj",
                rank=len(values),
                effective_rank=1.0,
                values=tuple(values),
            )
        )
    (strip,) = strips(modules)
    for values, shades in zip(columns, shades_of(strip), strict=True):
        largest = values[0] or 1.0
        expected = [value / largest for value in values]
        expected += [0.0] * (strip.rank - len(values))
        found = [shade / SHADES for shade in shades]
        assert found == pytest.approx(expected, abs=0.5 / SHADES + 1e-9, rel=0)


def spectra_of_rank(rank: int) -> list[ModuleSpectrum]:
    return [ModuleSpectrum.model_validate(values) for values in spectrum(rank)]


def norm(module: ModuleSpectrum) -> float:
    return math.hypot(*module.values)


def queries_of(modules: list[ModuleSpectrum]) -> list[ModuleSpectrum]:
    return [module for module in modules if "q_proj" in module.module]


def bar_heights(strip: Strip) -> list[float]:
    return [float(height) for height in re.findall(r"h\.8v-([\d.]+)", strip.bars)]


def test_layers_keep_their_order_and_bars_are_relative_to_the_largest() -> None:
    modules = spectra_of_rank(4)
    by_kind = {strip.kind: strip for strip in strips(modules)}
    assert list(by_kind) == ["q_proj", "o_proj", "down_proj"]
    heights = []
    for strip in by_kind.values():
        heights += bar_heights(strip)
    assert max(heights) == bar_heights(by_kind["down_proj"])[-1] == 1
    largest = norm(modules[-1])
    expected = [norm(module) / largest for module in queries_of(modules)]
    # three decimals are written
    assert bar_heights(by_kind["q_proj"]) == pytest.approx(expected, abs=5e-4)


def test_line_shows_the_effective_ranks() -> None:
    modules = spectra_of_rank(4)
    strip = strips(modules)[0]
    line = [float(point.split(",")[1]) for point in strip.line.split()]
    expected = [module.effective_rank for module in queries_of(modules)]
    # two decimals are written
    assert line == pytest.approx(expected, abs=5e-3)


def test_intruders_are_summed_over_the_counted_layers() -> None:
    modules = spectra_of_rank(4)
    counted = [each.intruders for each in queries_of(modules) if each.intruders is not None]
    strip = strips(modules)[0]
    assert strip.intruders == sum(counted) > 0
    assert strip.counted_layers == len(counted) < strip.layers
    unknown = [module.model_copy(update={"intruders": None}) for module in modules]
    assert strips(unknown)[0].intruders is None
