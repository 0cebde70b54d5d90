"""Gain and change against rank: the trained ranks, and the highest rank truncated to lower ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from pipelines.comparison.comparison import CONTROL
from pipelines.comparison.document import Summary
from pipelines.comparison.frontier import FrontierPoint
from pipelines.comparison.resampling import Interval
from pipelines.reporting.model_parts import rank_of
from pipelines.reporting.plots.drawing import (
    CONTROL_COLOR,
    GRID,
    INK,
    LIMIT,
    QUIET,
    RANK_COLORS,
    drawing,
    means,
    reaches,
    svg,
)

INCHES = (5.2, 4.5)
COLOR = RANK_COLORS[1]
Style = Mapping[str, Any]
COMMON_STYLE: Style = {"color": COLOR, "elinewidth": 1.1, "capsize": 3}
TRAINED_STYLE: Style = {"linewidth": 1.3, "marker": "o", "markersize": 6}
TRUNCATED_STYLE: Style = {
    "linestyle": "--",
    "linewidth": 0.9,
    "marker": "^",
    "markersize": 6,
    "markerfacecolor": "none",
    "alpha": 0.8,
}
Points = Sequence[FrontierPoint]
Metric = Callable[[FrontierPoint], Interval | None]


def plot_ranks(summary: Summary) -> str:
    """Return the plot of task gain and general change against rank as SVG.

    The control is a dashed line within its interval.
    """
    control: list[FrontierPoint] = []
    adapters: list[FrontierPoint] = []
    truncated: list[FrontierPoint] = []
    for point in summary.frontier:
        if point.cut_from is not None:
            truncated.append(point)
        elif point.trained:
            group = control if point.label == CONTROL else adapters
            group.append(point)
    with drawing("ranks", INCHES) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        figure.subplots_adjust(
            left=0.14,
            right=0.985,
            top=0.985,
            bottom=0.1,
            hspace=0.12,
        )
        for axes, metric in ((upper, _gain), (lower, _general)):
            _draw_intervals(axes, truncated, metric, TRUNCATED_STYLE)
            _draw_intervals(axes, adapters, metric, TRAINED_STYLE)
            _style_panel(axes)
            _draw_control(axes, control, metric)
        lower.axhline(0, color=QUIET, linewidth=0.8, zorder=0)
        limit = -summary.recipe.gate.max_general_drop
        lower.axhline(limit, color=LIMIT, linewidth=1.4, linestyle=":")
        upper.set_ylabel("Task gain (nats per token)")
        lower.set_ylabel("General change")
        _set_rank_axis(lower, [*adapters, *truncated])
        figure.align_ylabels([upper, lower])
        description = "Task gain and general change against the rank, with 95 % intervals"
        return svg(figure, "ranks", description)


def _gain(point: FrontierPoint) -> Interval:
    return point.gain


def _general(point: FrontierPoint) -> Interval | None:
    return point.general


def _draw_intervals(axes: Axes, points: Points, metric: Metric, style: Style) -> None:
    """Draw one metric of the points by rank; points without a score are skipped."""
    ranks: list[int] = []
    intervals: list[Interval] = []
    for point in sorted(points, key=rank_of):
        interval = metric(point)
        if interval is not None:
            ranks.append(rank_of(point))
            intervals.append(interval)
    if ranks:
        errors = reaches(intervals)
        axes.errorbar(
            ranks,
            means(intervals),
            yerr=errors,
            **COMMON_STYLE,
            **style,
        )


def _style_panel(axes: Axes) -> None:
    axes.margins(y=0.12)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_control(axes: Axes, points: Points, metric: Metric) -> None:
    for point in points:
        interval = metric(point)
        if interval is None:
            continue
        axes.axhspan(interval.low, interval.high, color=CONTROL_COLOR, alpha=0.13, linewidth=0)
        axes.axhline(interval.mean, color=CONTROL_COLOR, linewidth=1.4, linestyle="--")


def _set_rank_axis(axes: Axes, points: Points) -> None:
    ticks = sorted(set(map(rank_of, points)))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, labels=list(map(str, ticks)))
    axes.set_xlim(min(ticks) / 1.6, max(ticks) * 1.6)
    axes.set_xlabel("Rank", color=INK)
