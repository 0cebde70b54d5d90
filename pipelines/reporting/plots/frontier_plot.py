"""Learning against forgetting: every model, its snapshots, other learning rates and truncations.

The x axis is the gain on the task over the base in full precision, the y axis the general change by
training, so up and to the right is better. A curve starts at the base it was trained on. The 4-bit
base is to the left of zero: quantization costs some of the task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from pipelines.comparison.comparison import BASE, CONTROL, QUANTIZED_BASE
from pipelines.reporting.plots.drawing import (
    CONTROL_COLOR,
    INK,
    LIMIT,
    QUIET,
    VARIABLES,
    ZERO,
    Box,
    Interval,
    Label,
    color_of,
    drawing,
    limits,
    reaches,
    svg,
    write_labels,
)

INCHES = (5.6, 4.5)
DESCRIPTION = (
    "General change against task gain of every model, snapshot, learning rate and truncation"
)
Summary = Mapping[str, Any]
Row = Mapping[str, Any]
Style = dict[str, Any]
Position = tuple[float, float]


@dataclass(frozen=True)
class Trajectory:
    """One trained model with everything that was scored during its training or derived from it."""

    label: str
    name: str
    color: str
    start: Position
    """Position of the base it was trained on."""
    end: Row
    """The row of the model itself."""
    snapshots: Sequence[Row]
    """By step, without the end."""
    rates: Sequence[Row]
    """The same training at other learning rates."""
    truncated: Sequence[Row]
    """The same adapter truncated to lower ranks, the highest rank first."""

    @property
    def variable(self) -> str:
        """Name of the color among the page's CSS variables."""
        return VARIABLES[self.color]

    @property
    def rows(self) -> list[Row]:
        """All rows that belong to the model."""
        others = [*self.snapshots, *self.rates, *self.truncated]
        return [self.end, *others]


def trajectories(summary: Summary) -> list[Trajectory]:
    """Return the trajectories of the control and of each adapter, from the rows of the frontier.

    There are none if no general ability was scored.
    """
    trained: list[Row] = []
    others: list[Row] = []
    for row in summary["frontier"]:
        if row["general"] is None:
            continue
        group = trained if row["trained"] else others
        group.append(row)
    ranks = [row["rank"] for row in trained if row["label"] != CONTROL]
    found = []
    for end in trained:
        label = end["label"]
        start = _start(summary, label)
        color = CONTROL_COLOR
        if label != CONTROL:
            color = color_of(end["rank"], ranks)
        found.append(_trajectory(end, others, color=color, start=start))
    return found


def _trajectory(end: Row, others: Sequence[Row], *, color: str, start: Position) -> Trajectory:
    """Return the trajectory that leads to `end`, from the rows that are not trained models."""
    is_control = end["label"] == CONTROL
    truncated: list[Row] = []
    snapshots: list[Row] = []
    rates: list[Row] = []
    for row in others:
        if row["cut_from"] is not None:
            if row["cut_from"] == end["rank"] and not is_control:
                truncated.append(row)
        elif _trained_label(row) == end["label"]:
            same_rate = row["learning_rate"] == end["learning_rate"]
            siblings = snapshots if same_rate else rates
            siblings.append(row)
    return Trajectory(
        label=end["label"],
        name=CONTROL if is_control else f"rank {end['rank']}",
        color=color,
        start=start,
        end=end,
        snapshots=sorted(snapshots, key=lambda row: row["step"]),
        rates=sorted(rates, key=lambda row: row["learning_rate"]),
        truncated=sorted(truncated, key=lambda row: -row["rank"]),
    )


def _trained_label(row: Row) -> str:
    """Return the label of the trained model that a snapshot or another learning rate belongs to."""
    label: str = row["label"]
    return label.partition("@")[0].partition(" lr ")[0]


def _start(summary: Summary, label: str) -> Position:
    if label == CONTROL and summary["control"]["method"] == "full":
        return 0.0, 0.0
    return _quantized_base(summary) or (0.0, 0.0)


def _quantized_base(summary: Summary) -> Position | None:
    """Return the position of the 4-bit base; None if there is none."""
    model = summary["models"].get(QUANTIZED_BASE)
    if model is None:
        return None
    return model["change"]["task_gain"]["mean"], 0.0


def plot_frontier(summary: Summary) -> str:
    """Return the plot as SVG; the area that the gate rejects is shaded.

    Args:
        summary: see `pipelines.comparison.comparison`, with the additional keys `recipe` and
            `frontier`.
    """
    found = trajectories(summary)
    with drawing("frontier", INCHES) as figure:
        axes = figure.add_axes((0.135, 0.1, 0.855, 0.885))
        _set_frame(axes, found, summary)
        _shade_rejected(axes, summary)
        for trajectory in found:
            _draw(axes, trajectory)
        _draw_bases(axes, summary)
        _write_all_labels(axes, found, summary)
        return svg(figure, "frontier", DESCRIPTION)


def _set_frame(axes: Axes, found: Sequence[Trajectory], summary: Summary) -> None:
    """Set axis limits that contain all points, and the intervals of the trained models."""
    x = _extent("gain", found)
    y = _extent("general", found)
    for trajectory in found:
        gain, _ = trajectory.start
        x.append(gain)
    y.append(-summary["recipe"]["gate"]["max_general_drop"])
    axes.set_xlim(*limits(x))
    axes.set_ylim(*limits(y))
    axes.set_xlabel("Task gain (nats per token) – learned more →")
    axes.set_ylabel("← forgot more – General change")


def _extent(key: str, found: Sequence[Trajectory]) -> list[float]:
    """Return the values that an axis has to show."""
    intervals: list[Interval] = [ZERO]
    values = []
    for trajectory in found:
        intervals.append(trajectory.end[key])
        for row in trajectory.rows:
            values.append(row[key]["mean"])
    for interval in intervals:
        values += [interval["low"], interval["high"]]
    return values


def _shade_rejected(axes: Axes, summary: Summary) -> None:
    """Shade what the gate rejects: too much forgetting, too little of the control's mean gain."""
    gate = summary["recipe"]["gate"]
    _shade_forgetting(axes, -gate["max_general_drop"])
    control = summary["models"].get(CONTROL)
    if control is None:
        return
    gain = control["total"]["task_gain"]
    if gain["low"] > 0:
        min_fraction = gate["min_gain_share"]
        _shade_low_gain(axes, min_fraction=min_fraction, control_gain=gain["mean"])


def _shade_forgetting(axes: Axes, drop: float) -> None:
    left, _ = axes.get_xlim()
    bottom, _ = axes.get_ylim()
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


def _shade_low_gain(axes: Axes, *, min_fraction: float, control_gain: float) -> None:
    left, right = axes.get_xlim()
    _, top = axes.get_ylim()
    least = min_fraction * control_gain
    axes.axvspan(left, least, color=QUIET, alpha=0.09, linewidth=0)
    axes.axvline(least, color=QUIET, linewidth=1.1, linestyle=":")
    on_left = least - left > right - least
    axes.annotate(
        f"{100 * min_fraction:g}\u00a0% of the control's gain",
        (least, top),
        xytext=(-4 if on_left else 4, -8),
        textcoords="offset points",
        ha="right" if on_left else "left",
        color=INK,
        size=7.5,
    )


def _draw_bases(axes: Axes, summary: Summary) -> None:
    for x, y in _bases(summary).values():
        axes.plot(x, y, marker="+", color=INK, markersize=9, markeredgewidth=1.6)


def _bases(summary: Summary) -> dict[str, Position]:
    """Return name → position of the bases."""
    bases = {BASE: (0.0, 0.0)}
    quantized = _quantized_base(summary)
    if quantized is not None:
        bases[QUANTIZED_BASE] = quantized
    return bases


def _draw(axes: Axes, trajectory: Trajectory) -> None:
    """Draw the path through the snapshots, other learning rates, truncations and the end."""
    end = _position(trajectory.end)
    style: Style = {"color": trajectory.color}
    snapshots = [_position(row) for row in trajectory.snapshots]
    path = [trajectory.start, *snapshots, end]
    dots: Style = {"linestyle": "none", "marker": "o", "markersize": 3.2}
    x, y = _columns(path)
    axes.plot(x, y, linewidth=1.3, alpha=0.85, zorder=2, **style)
    axes.plot(x[1:], y[1:], **dots, zorder=3, **style)
    square: Style = {"marker": "s", "markersize": 4.6, "markerfacecolor": "none"}
    for row in trajectory.rates:
        at = _position(row)
        x, y = _columns([end, at])
        axes.plot(x, y, linewidth=0.8, linestyle=":", zorder=1, **style)
        axes.plot(*at, **square, zorder=3, **style)
    if trajectory.truncated:
        _draw_truncated(axes, trajectory, end)
    axes.errorbar(
        *end,
        xerr=reaches([trajectory.end["gain"]]),
        yerr=reaches([trajectory.end["general"]]),
        marker="D" if trajectory.label == CONTROL else "o",
        markersize=7,
        elinewidth=1,
        capsize=2.5,
        zorder=4,
        **style,
    )


def _draw_truncated(axes: Axes, trajectory: Trajectory, end: Position) -> None:
    style: Style = {"color": trajectory.color}
    triangles: Style = {"marker": "^", "markersize": 5, "markerfacecolor": "none"}
    positions = [_position(row) for row in trajectory.truncated]
    x, y = _columns([end, *positions])
    axes.plot(x, y, linewidth=0.9, linestyle="--", zorder=1, **style)
    axes.plot(x[1:], y[1:], linestyle="none", **triangles, zorder=3, **style)


def _columns(positions: Sequence[Position]) -> tuple[list[float], list[float]]:
    """Return the x values and the y values."""
    x_values = []
    y_values = []
    for x, y in positions:
        x_values.append(x)
        y_values.append(y)
    return x_values, y_values


def _write_all_labels(axes: Axes, found: Sequence[Trajectory], summary: Summary) -> None:
    labels = []
    obstacles: list[Box] = []
    for name, at in _bases(summary).items():
        labels.append(Label(name, at, INK))
        obstacles.append((*at, *at))
    for trajectory in found:
        labels += _labels(trajectory, with_steps=trajectory is found[0])
        obstacles += _obstacles(trajectory)
    write_labels(axes, labels, obstacles)


def _labels(trajectory: Trajectory, *, with_steps: bool) -> list[Label]:
    """Return the labels of the model, its truncations and learning rates, and of its steps.

    Steps are the same for all models, so that only the first trajectory names them.
    """
    color = trajectory.color
    labels = [Label(trajectory.name, _position(trajectory.end), color)]
    for row in trajectory.truncated:
        text = f"truncated to {row['rank']}"
        labels.append(Label(text, _position(row), color, is_main=False))
    for row in trajectory.rates:
        text = f"{row['learning_rate']:g}"
        labels.append(Label(text, _position(row), color, is_main=False))
    if with_steps:
        for row in trajectory.snapshots:
            text = f"{row['step']} steps"
            labels.append(Label(text, _position(row), color, is_main=False))
    return labels


def _obstacles(trajectory: Trajectory) -> list[Box]:
    """Return the boxes of its points and of the two error bars of its end, which are lines."""
    boxes: list[Box] = []
    for row in trajectory.rows:
        x, y = _position(row)
        boxes.append((x, y, x, y))
    x, y = _position(trajectory.end)
    gain = trajectory.end["gain"]
    general = trajectory.end["general"]
    horizontal = (gain["low"], y, gain["high"], y)
    vertical = (x, general["low"], x, general["high"])
    return [*boxes, horizontal, vertical]


def _position(row: Row) -> Position:
    gain = row["gain"]["mean"]
    general = row["general"]["mean"]
    return gain, general
