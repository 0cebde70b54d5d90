"""What each rank learnt and changed: the trained ranks, and beside them the highest one cut to lower ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from pipelines.comparison.comparison import CONTROL
from pipelines.reporting.plots.drawing import (
    CONTROL_COLOUR,
    GRID,
    INK,
    LIMIT,
    QUIET,
    RANK_COLOURS,
    Interval,
    drawing,
    means,
    reaches,
    svg,
)

INCHES = (5.2, 4.5)
COLOUR = RANK_COLOURS[1]
Points = Sequence[tuple[int, Interval]]


def plot_ranks(summary: Mapping[str, Any]) -> str:
    """Return the SVG of task gain and general change against the rank, the control as a dashed line in its interval.

    Args:
        summary: see `pipelines.comparison.comparison`, with `recipe` and `frontier` beside it.
    """
    adapters = [row for row in summary["frontier"] if row["trained"] and row["label"] != CONTROL]
    cuts = [row for row in summary["frontier"] if row["cut_from"] is not None]
    control = [row for row in summary["frontier"] if row["trained"] and row["label"] == CONTROL]
    with drawing("ranks", INCHES) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        figure.subplots_adjust(left=0.14, right=0.985, top=0.985, bottom=0.1, hspace=0.12)
        for axes, name in ((upper, "gain"), (lower, "general")):
            _panel(axes, _points(adapters, name), _points(cuts, name))
            _control_band(axes, [row[name] for row in control if row[name] is not None])
        lower.axhline(0, color=QUIET, linewidth=0.8, zorder=0)
        lower.axhline(
            -summary["recipe"]["gate"]["max_general_drop"],
            color=LIMIT,
            linewidth=1.4,
            linestyle=":",
        )
        upper.set_ylabel("Task gain (nats per token)")
        lower.set_ylabel("General change")
        _rank_axis(lower, [row["rank"] for row in (*adapters, *cuts)])
        figure.align_ylabels([upper, lower])
        return svg(
            figure, "ranks", "Task gain and general change against the rank, with 95 % intervals"
        )


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Return the rows by rank; without those whose figure could not be scored."""
    return sorted(
        ((row["rank"], row[name]) for row in rows if row[name] is not None),
        key=lambda point: point[0],
    )


def _panel(axes: Axes, trained: Points, cut: Points) -> None:
    common: dict[str, Any] = {"color": COLOUR, "elinewidth": 1.1, "capsize": 3}
    of_cuts: dict[str, Any] = {
        "linestyle": "--",
        "linewidth": 0.9,
        "marker": "^",
        "markersize": 6,
        "markerfacecolor": "none",
        "alpha": 0.8,
    }
    of_trained: dict[str, Any] = {"linewidth": 1.3, "marker": "o", "markersize": 6}
    for points, style in ((cut, of_cuts), (trained, of_trained)):
        if points:
            intervals = [interval for _, interval in points]
            axes.errorbar(
                [rank for rank, _ in points],
                means(intervals),
                yerr=reaches(intervals),
                **common,
                **style,
            )
    axes.margins(y=0.12)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _control_band(axes: Axes, intervals: Sequence[Interval]) -> None:
    for interval in intervals:
        axes.axhspan(
            interval["low"], interval["high"], color=CONTROL_COLOUR, alpha=0.13, linewidth=0
        )
        axes.axhline(interval["mean"], color=CONTROL_COLOUR, linewidth=1.4, linestyle="--")


def _rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(set(ranks)), labels=[str(rank) for rank in sorted(set(ranks))])
    axes.set_xlim(min(ranks) / 1.6, max(ranks) * 1.6)
    axes.set_xlabel("Rank", color=INK)
