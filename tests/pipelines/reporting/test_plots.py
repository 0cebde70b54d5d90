"""The plots show every row of the frontier once, on the way it belongs to, and strips hold the spectra they were made of."""

import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from summaries import Summary, build, spectrum

from pipelines.reporting.plots.drawing import RANK_COLOURS, colour_of
from pipelines.reporting.plots.frontier_plot import Way, plot_frontier, ways
from pipelines.reporting.plots.rank_plot import plot_ranks
from pipelines.reporting.plots.strips import SHADES, Strip, strips


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


def by_label(summary: Summary) -> dict[str, Way]:
    return {way.label: way for way in ways(summary)}


def test_every_row_of_the_frontier_is_on_one_way(summary: Summary) -> None:
    drawn = [row["label"] for way in ways(summary) for row in way.rows]
    assert sorted(drawn) == sorted(row["label"] for row in summary["frontier"])


def test_a_way_leads_from_its_base_through_its_snapshots(summary: Summary) -> None:
    found = by_label(summary)
    assert (
        [row["step"] for row in found["control"].snapshots]
        == [row["step"] for row in found["rank-16"].snapshots]
        == [5, 10]
    )
    assert found["control"].start == (0.0, 0.0)
    assert found["rank-16"].start == (
        summary["models"]["base-nf4"]["change"]["task_gain"]["mean"],
        0.0,
    )
    assert [row["label"] for row in found["rank-16"].rates] == ["rank-16 lr 0.0005"]
    assert [row["label"] for row in found["control"].rates] == ["control lr 0.0003"]
    assert [row["rank"] for row in found["rank-64"].cuts] == [8, 2]
    assert not found["rank-16"].cuts and not found["control"].cuts


def test_a_control_by_lora_begins_where_the_adapters_do(summary: Summary) -> None:
    summary["control"]["method"] = "lora"
    found = by_label(summary)
    assert found["control"].start == found["rank-16"].start


def test_another_rate_of_the_control_is_drawn_and_named_beside_it(summary: Summary) -> None:
    squares, labels = drawn(summary)
    summary["frontier"] = [
        row for row in summary["frontier"] if row["label"] != "control lr 0.0003"
    ]
    fewer, without = drawn(summary)
    assert squares - fewer == 1 and labels - without == {"0.0003"}


def drawn(summary: Summary) -> tuple[int, set[str]]:
    """Return how many dotted lines of the control's colour lead to another rate, and the labels in that colour."""
    svg = plot_frontier(summary)
    dotted = re.findall(
        r'<path d="[^"]*" clip-path="[^"]*" style="fill: none; stroke-dasharray: 0.8[^"]*stroke: var\(--control',
        svg,
    )
    return len(dotted), set(re.findall(r"fill: var\(--control[^>]*>([^<]*)</text>", svg))


def test_over_a_dense_base_all_begin_at_zero(summary: Summary) -> None:
    del summary["models"]["base-nf4"]
    assert {way.start for way in ways(summary)} == {(0.0, 0.0)}


def test_each_rank_has_its_colour_whatever_the_order(summary: Summary) -> None:
    assert [colour_of(rank, [64, 4, 16]) for rank in (4, 16, 64)] == list(RANK_COLOURS[:3])
    assert len({way.colour for way in ways(summary)}) == 4


def test_a_control_that_did_not_learn_has_no_share_to_draw(summary: Summary) -> None:
    assert "of the control's gain" in plot_frontier(summary)
    summary["models"]["control"]["total"]["task_gain"]["low"] = -0.1
    assert "of the control's gain" not in plot_frontier(summary)


def test_one_rank_alone_is_drawn(summary: Summary) -> None:
    summary["frontier"] = [row for row in summary["frontier"] if row["label"] == "rank-16"]
    assert plot_ranks(summary).count("<svg") == plot_frontier(summary).count("<svg") == 1


def levels(strip: Strip) -> list[list[int]]:
    """Read a strip's paths back: the shade of each cell, column by column."""
    cells = [[0] * strip.rank for _ in range(strip.layers)]
    for shade, path in strip.shades.items():
        for column, top, height in re.findall(r"M(\d+) (\d+)h1v(\d+)h-1z", path):
            for place in range(int(top), int(top) + int(height)):
                assert cells[int(column)][place] == 0, "a cell is painted twice"
                cells[int(column)][place] = shade
    return cells


@given(
    st.lists(
        st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=9).map(
            lambda v: sorted(v, reverse=True)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_strip_is_its_spectra_to_half_a_shade(columns: list[list[float]]) -> None:
    modules = [
        {
            "module": f"layers.{place}.q_proj",
            "rank": len(values),
            "effective_rank": 1.0,
            "values": values,
        }
        for place, values in enumerate(columns)
    ]
    (strip,) = strips(modules)
    for values, shades in zip(columns, levels(strip), strict=True):
        expected = [value / values[0] if values[0] else 0.0 for value in values] + [0.0] * (
            strip.rank - len(values)
        )
        assert all(
            abs(shade / SHADES - value) <= 0.5 / SHADES + 1e-9
            for shade, value in zip(shades, expected, strict=True)
        )


def test_kinds_keep_their_layers_in_order_and_sizes_are_beside_the_largest() -> None:
    modules = spectrum(4)
    found = {strip.kind: strip for strip in strips(modules)}
    assert list(found) == ["q_proj", "o_proj", "down_proj"]
    heights = {
        kind: [float(h) for h in re.findall(r"h\.8v-([\d.]+)", strip.bars)]
        for kind, strip in found.items()
    }
    assert max(max(values) for values in heights.values()) == heights["down_proj"][-1] == 1
    sizes = [
        sum(v * v for v in module["values"]) ** 0.5
        for module in modules
        if "q_proj" in module["module"]
    ]
    largest = sum(v * v for v in modules[-1]["values"]) ** 0.5
    assert heights["q_proj"] == pytest.approx(
        [size / largest for size in sizes], abs=5e-4
    )  # three decimals are written
    line = [float(point.split(",")[1]) for point in found["q_proj"].line.split()]
    assert line == pytest.approx(
        [m["effective_rank"] for m in modules if "q_proj" in m["module"]], abs=5e-3
    )  # two are
