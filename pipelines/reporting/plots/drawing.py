"""What the report's plots share: style, colours, intervals, labels that avoid each other, and SVG that fits into a page.

Text stays text, identifiers are salted by the plot's name and no date is kept, so equal summaries give equal bytes. A
colour is written as a variable of the page with its light value behind it, so that a dark page can replace it. Markers
and dashes say what colours say, for readers who cannot tell these apart.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

CONTROL_COLOUR, LIMIT, QUIET, INK, GRID = "#d55e00", "#cc79a7", "#8a8f98", "#33373d", "#e6e8eb"
RANK_COLOURS = ("#0e8f7e", "#0072b2", "#6f4fc0", "#a23e8c", "#5b6b2f", "#7a5230")
"""One for each adapter, from the lowest rank; control's orange stands apart from all of them."""
VARIABLES = {CONTROL_COLOUR: "control", LIMIT: "limit", QUIET: "axis", INK: "ink", GRID: "grid"}
VARIABLES |= {colour: f"rank-{place}" for place, colour in enumerate(RANK_COLOURS)}
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
Interval = Mapping[str, float]
Box = tuple[float, float, float, float]
ZERO: Interval = {"mean": 0.0, "low": 0.0, "high": 0.0}
PLACES = [
    (side * reach, up) for up in (6, -14, 17, -25, 28, -36) for reach in (8, 14) for side in (1, -1)
]
"""Where a label may begin (right of its point) or end (left of it), in points; the nearest first."""
LABEL_COST = 10
"""How many points or bars a label rather covers than another label."""


@dataclass(frozen=True)
class Label:
    """A word beside a point."""

    text: str
    at: tuple[float, float]
    """In the units of the axes."""
    colour: str
    is_main: bool = True
    """Bold, and written in any case; another is left out where there is no room for it."""


@contextmanager
def drawing(name: str, inches: tuple[float, float]) -> Iterator[Figure]:
    """Yield an empty figure in the report's style, of 72 points an inch."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        yield Figure(figsize=inches, dpi=72)


def colour_of(rank: int, ranks: Sequence[int]) -> str:
    """Return the colour of a rank among those that were trained."""
    return RANK_COLOURS[sorted(ranks).index(rank) % len(RANK_COLOURS)]


def means(intervals: Sequence[Interval]) -> list[float]:
    """Return the means."""
    return [interval["mean"] for interval in intervals]


def reaches(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return how far each interval reaches below and above its mean."""
    return [
        [max(0.0, interval["mean"] - interval["low"]) for interval in intervals],
        [max(0.0, interval["high"] - interval["mean"]) for interval in intervals],
    ]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis that shows all values, with some room."""
    room = 0.08 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


def write_labels(axes: Axes, labels: Sequence[Label], obstacles: Sequence[Box]) -> None:
    """Write each label at the nearest place beside its point where it covers nothing, or where it covers least.

    Args:
        axes: their limits are set.
        labels: the main ones are placed first.
        obstacles: left, bottom, right, top of points and bars, in the units of the axes.
    """
    taken = [(_padded(axes, obstacle), 1) for obstacle in obstacles]
    for label in sorted(labels, key=lambda label: not label.is_main):
        x, y = axes.transData.transform(label.at)
        boxes = {place: _label_box(x, y, place, label) for place in PLACES}
        costs = {
            place: sum(cost for other, cost in taken if _overlap(box, other))
            for place, box in boxes.items()
            if _inside(axes, box)
        }
        place = min(costs, key=costs.__getitem__, default=PLACES[0])
        if costs.get(place, 0) and not label.is_main:
            continue
        taken.append((boxes[place], LABEL_COST))
        axes.annotate(
            label.text,
            label.at,
            xytext=place,
            textcoords="offset points",
            horizontalalignment="left" if place[0] > 0 else "right",
            color=label.colour,
            weight="bold" if label.is_main else "normal",
            size=9 if label.is_main else 7.5,
        )


def _padded(axes: Axes, box: Box) -> Box:
    (left, bottom), (right, top) = axes.transData.transform([box[:2], box[2:]])
    return left - 3, bottom - 3, right + 3, top + 3


def _label_box(x: float, y: float, place: tuple[int, int], label: Label) -> Box:
    """Return what a label covers, in points: left, bottom, right, top."""
    width = (6.3 if label.is_main else 4.8) * len(label.text)
    left = x + place[0] - (width if place[0] < 0 else 0)
    return left, y + place[1] - 2, left + width, y + place[1] + 8


def _overlap(first: Box, second: Box) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _inside(axes: Axes, box: Box) -> bool:
    left, bottom, right, top = axes.bbox.extents
    return bool(box[0] >= left and box[1] >= bottom and box[2] <= right and box[3] <= top)


def svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an <svg> element whose identifiers begin with the name, as one page holds several."""
    stream = StringIO()
    FigureCanvasSVG(
        figure
    )  # takes the figure's default canvas away, and with it pyplot's choice of one
    figure.savefig(
        stream,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    text = stream.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(f": {colour}", f": var(--{variable}, {colour})")
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
