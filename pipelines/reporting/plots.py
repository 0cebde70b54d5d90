"""The report's two plots as inline SVG: what each rank gained and changed, and learning against forgetting.

Text stays text, identifiers are salted by the plot's name and no date is kept, so equal summaries give equal bytes.
Colours are Okabe and Ito's, which readers with colour-blindness can tell apart; markers and dashes say the same.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pipelines.judging.comparison import BASE, CONTROL

ADAPTER, FULL, LIMIT, QUIET = "#0072B2", "#D55E00", "#CC79A7", "#8A8F98"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": "#33373D",
    "xtick.color": "#33373D",
    "ytick.color": "#33373D",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
}
BARS: dict[str, Any] = {"color": ADAPTER, "ecolor": ADAPTER, "elinewidth": 1.2, "capsize": 3, "marker": "o", "markersize": 6}
INCHES = (5.4, 4.7)
GAIN, GENERAL = "Task gain (nats per token)", "General change (choice probability)"
PLACES = [(side, up) for up in (6, -15, 18, -27, 30, -39) for side in (8, -8)]
"""Where a label may begin (right of its point) or end (left of it), in points; the nearest first."""
Interval = Mapping[str, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """One model in the plane of learning and forgetting."""

    label: str
    gain: Interval
    """Task gain over the full-precision base, nats per token."""
    general: Interval
    """Change of choice probability by training."""


def plot_by_rank(summary: Mapping[str, Any]) -> str:
    """Return the SVG of task gain and general change against the rank, the control as a dashed line in its interval.

    Args:
        summary: see `pipelines.judging.comparison`, with `recipe` beside it.
    """
    points = _adapters(summary)
    with mpl.rc_context({**STYLE, "svg.hashsalt": "by-rank"}):
        figure = Figure(figsize=INCHES)
        upper, lower = figure.subplots(2, 1, sharex=True)
        figure.subplots_adjust(left=0.14, right=0.98, top=0.91, bottom=0.1, hspace=0.12)
        control = _point(summary, CONTROL)
        _panel(upper, [(rank, point.gain) for rank, point in points], control.gain)
        _panel(lower, [(rank, point.general) for rank, point in points], control.general)
        lower.axhline(0, color=QUIET, linewidth=0.8, zorder=0)
        lower.axhline(_limit(summary), color=LIMIT, linewidth=1.6, linestyle=":", label="the gate's limit")
        upper.set_ylabel("Task gain")
        lower.set_ylabel("General change")
        _rank_axis(lower, [rank for rank, _ in points])
        figure.align_ylabels([upper, lower])
        handles, names = lower.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="upper center", ncols=3, handlelength=2.4, columnspacing=1.6)
        return _svg(figure, "by-rank", "Task gain and general change against the rank, with 95 % intervals")


def plot_trade_off(summary: Mapping[str, Any]) -> str:
    """Return the SVG of learning (to the right) against forgetting (downwards), a labelled point for each model.

    Args:
        summary: see `pipelines.judging.comparison`, with `recipe` beside it.
    """
    adapters, control, limit = [point for _, point in _adapters(summary)], _point(summary, CONTROL), _limit(summary)
    with mpl.rc_context({**STYLE, "svg.hashsalt": "trade-off"}):
        figure = Figure(figsize=INCHES, dpi=72)
        axes = figure.add_axes((0.15, 0.1, 0.83, 0.87))
        axes.set_xlim(*_limits([point.gain for point in (*adapters, control)], [0.0]))
        axes.set_ylim(*_limits([point.general for point in (*adapters, control)], [0.0, limit]))
        axes.axhspan(axes.get_ylim()[0], limit, color=LIMIT, alpha=0.14, linewidth=0)
        axes.axhline(limit, color=LIMIT, linewidth=1.6, linestyle=":")
        axes.axhline(0, color=QUIET, linewidth=0.8, zorder=0)
        axes.plot(0, 0, marker="+", color=QUIET, markersize=9, markeredgewidth=1.6)
        for point in adapters:
            _cross(axes, point, BARS)
        _cross(axes, control, {**BARS, "color": FULL, "ecolor": FULL, "marker": "D"})
        axes.set_xlabel(GAIN + " – learnt more →")
        axes.set_ylabel("← forgot more – " + GENERAL)
        zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
        _label_points(axes, [Point(BASE, zero, zero), control, *adapters])
        _note(axes, limit)
        return _svg(figure, "trade-off", "General change against task gain, with 95 % intervals in both directions")


def _panel(axes: Axes, points: Sequence[tuple[int, Interval]], control: Interval) -> None:
    axes.axhspan(control["low"], control["high"], color=FULL, alpha=0.13, linewidth=0)
    axes.axhline(control["mean"], color=FULL, linewidth=1.5, linestyle="--", label="control: full fine-tuning")
    intervals = [interval for _, interval in points]
    axes.errorbar([rank for rank, _ in points], _means(intervals), yerr=_ends(intervals), linewidth=1, label="adapters", **BARS)
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#E6E8EB", linewidth=0.7)
    axes.set_axisbelow(True)


def _rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(ranks), labels=[str(rank) for rank in ranks])
    axes.set_xlim(min(ranks) / 1.6, max(ranks) * 1.6)
    axes.set_xlabel("Rank")


def _cross(axes: Axes, point: Point, style: Mapping[str, Any]) -> None:
    axes.errorbar(point.gain["mean"], point.general["mean"], xerr=_ends([point.gain]), yerr=_ends([point.general]), **style)


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write each label beside its point, at the first place where it covers neither a point nor another label."""
    centres = [axes.transData.transform((point.gain["mean"], point.general["mean"])) for point in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in centres]
    for point, (x, y) in zip(points, centres, strict=True):
        boxes = {place: _label_box(x, y, place, point.label) for place in PLACES}
        free = [place for place, box in boxes.items() if _inside(axes, box) and not any(_overlap(box, other) for other in taken)]
        place = free[0] if free else PLACES[0]
        taken.append(boxes[place])
        axes.annotate(
            point.label,
            (point.gain["mean"], point.general["mean"]),
            xytext=place,
            textcoords="offset points",
            horizontalalignment="left" if place[0] > 0 else "right",
            color={BASE: "#5C626B", CONTROL: "#A84300"}.get(point.label, "#005A8E"),
            weight="bold",
        )


def _label_box(x: float, y: float, place: tuple[int, int], label: str) -> Box:
    """Return what a label covers, in points: left, bottom, right, top."""
    width = 5.4 * len(label)
    left = x + place[0] - (width if place[0] < 0 else 0)
    return left, y + place[1], left + width, y + place[1] + 10


def _note(axes: Axes, limit: float) -> None:
    axes.annotate(
        f"beyond the gate's limit ({limit:+.3g})".replace("-", "−"),
        (axes.get_xlim()[0], limit),
        xytext=(5, -12),
        textcoords="offset points",
        color="#8F3F6C",
    )


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _inside(axes: Axes, box: Box) -> bool:
    left, bottom, right, top = axes.bbox.extents
    return bool(box[0] >= left and box[1] >= bottom and box[2] <= right and box[3] <= top)


def _limits(intervals: Sequence[Interval], others: Sequence[float]) -> tuple[float, float]:
    low = min([interval["low"] for interval in intervals] + list(others))
    high = max([interval["high"] for interval in intervals] + list(others))
    room = 0.1 * (high - low) or 1.0
    return low - room, high + room


def _means(intervals: Sequence[Interval]) -> list[float]:
    return [interval["mean"] for interval in intervals]


def _ends(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return how far each interval reaches below and above its mean."""
    return [
        [max(0.0, interval["mean"] - interval["low"]) for interval in intervals],
        [max(0.0, interval["high"] - interval["mean"]) for interval in intervals],
    ]


def _adapters(summary: Mapping[str, Any]) -> list[tuple[int, Point]]:
    ranks = {label: model["rank"] for label, model in summary["models"].items() if "verdict" in model}
    return [(ranks[label], _point(summary, label)) for label in sorted(ranks, key=ranks.__getitem__)]


def _point(summary: Mapping[str, Any], label: str) -> Point:
    model = summary["models"][label]
    name = label if model["rank"] is None else f"rank {model['rank']}"
    return Point(name, model["total"]["task_gain"], model["change"]["choice_probability"])


def _limit(summary: Mapping[str, Any]) -> float:
    return -float(summary["recipe"]["gate"]["max_general_drop"])


def _svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an <svg> element whose identifiers begin with the name, as one page holds several."""
    stream = StringIO()
    FigureCanvasSVG(figure)  # takes the figure's default canvas away, and with it pyplot's choice of one
    figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = stream.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
