"""Learning against forgetting: every model, its way there step by step, other rates and cuts, in one plane.

To the right more was learnt over the base in full precision; upwards less was forgotten by training. A curve begins at
the base it was trained on, which in 4 bits stands to the left of zero: quantising it lost something of the task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from pipelines.comparison.comparison import BASE, CONTROL, QUANTIZED_BASE
from pipelines.reporting.plots.drawing import (
    CONTROL_COLOUR,
    INK,
    LIMIT,
    QUIET,
    VARIABLES,
    ZERO,
    Box,
    Interval,
    Label,
    colour_of,
    drawing,
    limits,
    reaches,
    svg,
    write_labels,
)

INCHES = (5.6, 4.5)
Row = Mapping[str, Any]
Place = tuple[float, float]


@dataclass(frozen=True)
class Way:
    """One trained model with all that was scored on the way to it and beside it."""

    label: str
    name: str
    colour: str
    start: Place
    """Where its base stands."""
    end: Row
    """The row of the model itself."""
    snapshots: Sequence[Row]
    """By step, without the end."""
    rates: Sequence[Row]
    """The same training at other learning rates."""
    cuts: Sequence[Row]
    """The same adapter at lower ranks, the highest first."""

    @property
    def variable(self) -> str:
        """Name of the colour among the page's variables."""
        return VARIABLES[self.colour]

    @property
    def rows(self) -> list[Row]:
        return [self.end, *self.snapshots, *self.rates, *self.cuts]


def ways(summary: Mapping[str, Any]) -> list[Way]:
    """Return the control's way and each adapter's, from the rows of the frontier; none where no general ability was scored."""
    rows = [row for row in summary["frontier"] if row["general"] is not None]
    trained = [row for row in rows if row["trained"]]
    ranks = [row["rank"] for row in trained if row["label"] != CONTROL]
    colours = {
        row["label"]: CONTROL_COLOUR if row["label"] == CONTROL else colour_of(row["rank"], ranks)
        for row in trained
    }
    besides = [row for row in rows if not row["trained"]]
    return [
        _way(end, besides, colours[end["label"]], _start(summary, end["label"])) for end in trained
    ]


def plot_frontier(summary: Mapping[str, Any]) -> str:
    """Return the SVG of the plane, what the gate asks shaded where it refuses.

    Args:
        summary: see `pipelines.comparison.comparison`, with `recipe` and `frontier` beside it.
    """
    found = ways(summary)
    with drawing("frontier", INCHES) as figure:
        axes = figure.add_axes((0.135, 0.1, 0.855, 0.885))
        _frame(axes, found, summary)
        _shade(axes, summary)
        for way in found:
            _draw(axes, way)
        bases = _bases(summary)
        for _, (x, y) in bases:
            axes.plot(x, y, marker="+", color=INK, markersize=9, markeredgewidth=1.6)
        labels = [Label(name, place, INK) for name, place in bases] + [
            label for way in found for label in _labels(way, is_first=way is found[0])
        ]
        write_labels(
            axes,
            labels,
            [(*place, *place) for _, place in bases]
            + [box for way in found for box in _obstacles(way)],
        )
        return svg(
            figure,
            "frontier",
            "General change against task gain of every model, snapshot, rate and cut",
        )


def _way(end: Row, rows: Sequence[Row], colour: str, start: Place) -> Way:
    label = end["label"]
    cuts = [row for row in rows if row["cut_from"] == end["rank"] and label != CONTROL]
    own = [
        row
        for row in rows
        if row["cut_from"] is None and row["label"].partition("@")[0].partition(" lr ")[0] == label
    ]
    snapshots = [row for row in own if row["learning_rate"] == end["learning_rate"]]
    return Way(
        label=label,
        name=CONTROL if label == CONTROL else f"rank {end['rank']}",
        colour=colour,
        start=start,
        end=end,
        snapshots=sorted(snapshots, key=lambda row: row["step"]),
        rates=sorted(
            (row for row in own if row not in snapshots), key=lambda row: row["learning_rate"]
        ),
        cuts=sorted(cuts, key=lambda row: -row["rank"]),
    )


def _start(summary: Mapping[str, Any], label: str) -> Place:
    quantized = summary["models"].get(QUANTIZED_BASE)
    on_full = label == CONTROL and summary["control"]["method"] == "full"
    return (
        (0.0, 0.0)
        if quantized is None or on_full
        else (quantized["change"]["task_gain"]["mean"], 0.0)
    )


def _bases(summary: Mapping[str, Any]) -> list[tuple[str, Place]]:
    quantized = summary["models"].get(QUANTIZED_BASE)
    return [(BASE, (0.0, 0.0))] + (
        [(QUANTIZED_BASE, (quantized["change"]["task_gain"]["mean"], 0.0))] if quantized else []
    )


def _frame(axes: Axes, found: Sequence[Way], summary: Mapping[str, Any]) -> None:
    rows = [row for way in found for row in way.rows]
    crosses = [way.end for way in found]
    gains: list[Interval] = [ZERO, *(end["gain"] for end in crosses)]
    general: list[Interval] = [ZERO, *(end["general"] for end in crosses)]
    across = [
        *(one[end] for one in gains for end in ("low", "high")),
        *(row["gain"]["mean"] for row in rows),
    ]
    up = [
        *(one[end] for one in general for end in ("low", "high")),
        *(row["general"]["mean"] for row in rows),
    ]
    axes.set_xlim(*limits([*across, *(way.start[0] for way in found)]))
    axes.set_ylim(*limits([*up, -summary["recipe"]["gate"]["max_general_drop"]]))
    axes.set_xlabel("Task gain (nats per token) – learnt more →")
    axes.set_ylabel("← forgot more – General change")


def _shade(axes: Axes, summary: Mapping[str, Any]) -> None:
    """Shade what the gate refuses: below its largest drop, and left of its least share of the control's mean gain."""
    gate, (left, right), (bottom, top) = summary["recipe"]["gate"], axes.get_xlim(), axes.get_ylim()
    drop = -gate["max_general_drop"]
    axes.axhspan(bottom, drop, color=LIMIT, alpha=0.13, linewidth=0)
    axes.axhline(drop, color=LIMIT, linewidth=1.4, linestyle=":")
    axes.axhline(0, color=QUIET, linewidth=0.7, zorder=0)
    axes.annotate(
        f"forgot more than {abs(drop):.3g}",
        (left, drop),
        xytext=(5, -11),
        textcoords="offset points",
        color=INK,
        size=7.5,
    )
    control = summary["models"].get(CONTROL)
    if control is not None and control["total"]["task_gain"]["low"] > 0:
        least = gate["min_gain_share"] * control["total"]["task_gain"]["mean"]
        axes.axvspan(left, least, color=QUIET, alpha=0.09, linewidth=0)
        axes.axvline(least, color=QUIET, linewidth=1.1, linestyle=":")
        note = f"{100 * gate['min_gain_share']:g}\u00a0% of the control's gain"
        side = "right" if least - left > right - least else "left"
        axes.annotate(
            note,
            (least, top),
            xytext=(-4 if side == "right" else 4, -8),
            textcoords="offset points",
            ha=side,
            color=INK,
            size=7.5,
        )


def _draw(axes: Axes, way: Way) -> None:
    end = _place(way.end)
    style: dict[str, Any] = {"color": way.colour}
    on_the_way = [way.start, *(_place(row) for row in way.snapshots), end]
    axes.plot(*zip(*on_the_way, strict=True), linewidth=1.3, alpha=0.85, zorder=2, **style)
    axes.plot(
        *zip(*on_the_way[1:], strict=True),
        linestyle="none",
        marker="o",
        markersize=3.2,
        zorder=3,
        **style,
    )
    for row in way.rates:
        axes.plot(
            *zip(end, _place(row), strict=True), linewidth=0.8, linestyle=":", zorder=1, **style
        )
        axes.plot(
            *_place(row), marker="s", markersize=4.6, markerfacecolor="none", zorder=3, **style
        )
    if way.cuts:
        axes.plot(
            *zip(end, *map(_place, way.cuts), strict=True),
            linewidth=0.9,
            linestyle="--",
            zorder=1,
            **style,
        )
        axes.plot(
            *zip(*map(_place, way.cuts), strict=True),
            linestyle="none",
            marker="^",
            markersize=5,
            markerfacecolor="none",
            zorder=3,
            **style,
        )
    axes.errorbar(
        *end,
        xerr=reaches([way.end["gain"]]),
        yerr=reaches([way.end["general"]]),
        marker="D" if way.label == CONTROL else "o",
        markersize=7,
        elinewidth=1,
        capsize=2.5,
        zorder=4,
        **style,
    )


def _labels(way: Way, *, is_first: bool) -> list[Label]:
    """Name the model, its cuts and its rates; the steps, which are the same for all, on the first way alone."""
    steps = [
        Label(f"{row['step']} steps", _place(row), way.colour, is_main=False)
        for row in way.snapshots
    ]
    rates = [
        Label(f"{row['learning_rate']:g}", _place(row), way.colour, is_main=False)
        for row in way.rates
    ]
    cuts = [
        Label(f"cut to {row['rank']}", _place(row), way.colour, is_main=False) for row in way.cuts
    ]
    return [
        Label(way.name, _place(way.end), way.colour),
        *cuts,
        *rates,
        *(steps if is_first else []),
    ]


def _obstacles(way: Way) -> list[Box]:
    """Return the boxes of its points and of the two bars of its end, which are lines."""
    points = [(*_place(row), *_place(row)) for row in way.rows]
    (x, y), gain, general = _place(way.end), way.end["gain"], way.end["general"]
    return [*points, (gain["low"], y, gain["high"], y), (x, general["low"], x, general["high"])]


def _place(row: Row) -> Place:
    return row["gain"]["mean"], row["general"]["mean"]
