"""Shared parts of the plots: style, colors, intervals, non-overlapping labels, embeddable SVG.

Text stays text, identifiers are salted with the plot's name and the SVG has no date, so equal
summaries give equal bytes. A color is written as a CSS variable of the page with its light value as
the fallback, so that a dark page can replace it. Markers and dashes carry the same information as
colors, for readers who cannot distinguish these.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import product
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipelines.comparison.resampling import Interval

CONTROL_COLOR = "#d55e00"
LIMIT = "#cc79a7"
QUIET = "#8a8f98"
INK = "#33373d"
GRID = "#e6e8eb"
RANK_COLORS = ("#0e8f7e", "#0072b2", "#6f4fc0", "#a23e8c", "#5b6b2f", "#7a5230")
"""One per adapter, from the lowest rank; distinct from the control's orange."""
VARIABLES = {CONTROL_COLOR: "control", LIMIT: "limit", QUIET: "axis", INK: "ink", GRID: "grid"}
VARIABLES |= {color: f"rank-{index}" for index, color in enumerate(RANK_COLORS)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}
Box = tuple[float, float, float, float]
Offset = tuple[int, int]
Size = tuple[float, float]
"""Width and height."""
ZERO = Interval(mean=0.0, low=0.0, high=0.0)
OFFSETS = [
    (side * distance, up)
    for up, distance, side in product(
        (6, -14, 17, -25, 28, -36),
        (8, 14),
        (1, -1),
    )
]
"""Where a label may begin (right of its point) or end (left of it), in points; nearest first."""
PADDING = 3
"""Free space around points and bars, in points."""
LABEL_COST = 10
"""A label covers up to this many points or bars before it covers another label."""


@dataclass(frozen=True)
class Label:
    """A word next to a point."""

    text: str
    at: tuple[float, float]
    """In data coordinates."""
    color: str
    is_main: bool = True
    """Bold and always written; other labels are omitted if there is not enough room for them."""


@contextmanager
def drawing(name: str, inches: Size) -> Iterator[Figure]:
    """Yield an empty figure in the report's style, with 72 points per inch.

    Args:
        name: of the plot; salts the identifiers in its SVG.
        inches: width and height.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        yield Figure(figsize=inches, dpi=72)


def color_of(rank: int, ranks: Sequence[int]) -> str:
    """Return the color of a rank among the trained ranks.

    Args:
        rank: of one of the adapters.
        ranks: all that were trained, in any order.
    """
    index = sorted(ranks).index(rank)
    return RANK_COLORS[index % len(RANK_COLORS)]


def means(intervals: Sequence[Interval]) -> list[float]:
    """Return the means of the intervals."""
    return [interval.mean for interval in intervals]


def reaches(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return how far each interval reaches below and above its mean."""
    below = []
    above = []
    for interval in intervals:
        below.append(max(0.0, interval.mean - interval.low))
        above.append(max(0.0, interval.high - interval.mean))
    return [below, above]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis that shows all values, with a margin."""
    low = min(values)
    high = max(values)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def write_labels(axes: Axes, labels: Sequence[Label], obstacles: Sequence[Box]) -> None:
    """Write each label at the nearest offset from its point at which it covers the least.

    Args:
        axes: their limits are set.
        labels: the main labels are placed first.
        obstacles: left, bottom, right, top of points and bars, in data coordinates.
    """
    taken = [(_padded(axes, obstacle), 1) for obstacle in obstacles]
    for label in sorted(labels, key=lambda label: not label.is_main):
        x, y = axes.transData.transform(label.at)
        costs: dict[Offset, int] = {}
        for offset in OFFSETS:
            box = _label_box(x, y, offset, label)
            if _inside(axes, box):
                costs[offset] = _overlap_cost(box, taken)
        offset = min(costs, key=costs.__getitem__, default=OFFSETS[0])
        if costs.get(offset, 0) and not label.is_main:
            continue
        taken.append((_label_box(x, y, offset, label), LABEL_COST))
        _write_label(axes, label, offset)


def _write_label(axes: Axes, label: Label, offset: Offset) -> None:
    right, _ = offset
    alignment = "left" if right > 0 else "right"
    weight = "bold" if label.is_main else "normal"
    size = 9 if label.is_main else 7.5
    axes.annotate(
        label.text,
        label.at,
        xytext=offset,
        textcoords="offset points",
        horizontalalignment=alignment,
        color=label.color,
        weight=weight,
        size=size,
    )


def _overlap_cost(box: Box, taken: Sequence[tuple[Box, int]]) -> int:
    total = 0
    for other, cost in taken:
        if _overlap(box, other):
            total += cost
    return total


def _padded(axes: Axes, box: Box) -> Box:
    """Return a box in points, with a margin."""
    corners = axes.transData.transform([box[:2], box[2:]])
    left, bottom = corners[0] - PADDING
    right, top = corners[1] + PADDING
    return left, bottom, right, top


def _label_box(x: float, y: float, offset: Offset, label: Label) -> Box:
    """Return the area that a label covers, in points: left, bottom, right, top."""
    right, up = offset
    width = (6.3 if label.is_main else 4.8) * len(label.text)
    left = x + right
    if right < 0:
        left -= width
    baseline = y + up
    return left, baseline - 2, left + width, baseline + 8


def _overlap(first: Box, second: Box) -> bool:
    left, bottom, right, top = first
    other_left, other_bottom, other_right, other_top = second
    across = left < other_right and other_left < right
    up = bottom < other_top and other_bottom < top
    return across and up


def _inside(axes: Axes, box: Box) -> bool:
    left, bottom, right, top = box
    min_x, min_y, max_x, max_y = axes.bbox.extents
    across = left >= min_x and right <= max_x
    up = bottom >= min_y and top <= max_y
    return bool(across and up)


def svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an <svg> element.

    Its identifiers are prefixed with the name, because one page has several plots.

    Args:
        figure: complete.
        name: of the plot, unique within a page.
        description: for readers that cannot see the plot.
    """
    stream = StringIO()
    FigureCanvasSVG(figure)  # replaces the default canvas, so that pyplot selects no backend
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(f": {color}", f": var(--{variable}, {color})")
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
