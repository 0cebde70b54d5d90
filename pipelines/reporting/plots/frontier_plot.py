"""Learning against forgetting: every model, its snapshots, other learning rates and truncations.

The x axis is the gain on the task over the base in full precision, the y axis the general change by
training, so up and to the right is better. A curve starts at the base it was trained on. The 4-bit
base is to the left of zero: quantization costs some of the task.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from pipelines.comparison.comparison import BASE, CONTROL, QUANTIZED_BASE
from pipelines.comparison.document import Summary
from pipelines.comparison.resampling import Interval
from pipelines.reporting.formats import signed
from pipelines.reporting.model_parts import total_of
from pipelines.reporting.plots.drawing import (
    INK,
    LIMIT,
    QUIET,
    ZERO,
    Box,
    Label,
    drawing,
    limits,
    reaches,
    svg,
    write_labels,
)
from pipelines.reporting.plots.trajectories import (
    Position,
    Trajectory,
    quantized_base_position,
    trajectories,
)

INCHES = (5.6, 4.5)
DESCRIPTION = (
    "General change against task gain of every model, snapshot, learning rate and truncation"
)
Style = dict[str, Any]


def plot_frontier(summary: Summary) -> str:
    """Return the plot as SVG; the area that the gate rejects is shaded."""
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
    """Set axis limits that contain the adapters with their intervals, and the gate's limit.

    The control and other learning rates may be far away; they must not compress the adapters.
    """
    shown = [trajectory for trajectory in found if not trajectory.end.is_control] or found
    gains = []
    changes = [ZERO]
    x = []
    y = [-summary.recipe.gate.max_general_drop]
    for trajectory in shown:
        gains.append(trajectory.end.gain)
        changes.append(trajectory.end.general)
        for point in [*trajectory.snapshots, *trajectory.truncated]:
            x.append(point.gain.mean)
            y.append(point.general.mean)
    axes.set_xlim(*limits([*x, *_both_ends(gains)]))
    axes.set_ylim(*limits([*y, *_both_ends(changes)]))
    axes.set_xlabel("Task gain (nats per token) – learned more →")
    axes.set_ylabel("← forgot more – General change")


def _is_inside(axes: Axes, position: Position) -> bool:
    x, y = position
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    return left <= x <= right and bottom <= y <= top


def outside(summary: Summary) -> list[str]:
    """Return the names of the trained models that the plot does not show, with their position."""
    found = trajectories(summary)
    with drawing("outside", INCHES) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        _set_frame(axes, found, summary)
        names = []
        for trajectory in found:
            if not _is_inside(axes, trajectory.end.position):
                gain, change = trajectory.end.position
                names.append(f"{trajectory.name} ({signed(gain)}, {signed(change)})")
    return names


def _both_ends(intervals: Sequence[Interval]) -> list[float]:
    values = []
    for interval in intervals:
        values += [interval.low, interval.high]
    return values


def _shade_rejected(axes: Axes, summary: Summary) -> None:
    """Shade what the gate rejects: too much forgetting, too little of the control's mean gain."""
    gate = summary.recipe.gate
    _shade_forgetting(axes, -gate.max_general_drop)
    control = summary.models.get(CONTROL)
    if control is None:
        return
    gain = total_of(control).task_gain
    if gain.low > 0:
        _shade_low_gain(axes, min_fraction=gate.min_gain_share, control_gain=gain.mean)


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
    if least <= left:
        return
    axes.axvspan(left, min(least, right), color=QUIET, alpha=0.09, linewidth=0)
    if least >= right:
        return
    axes.axvline(least, color=QUIET, linewidth=1.1, linestyle=":")
    on_left = least - left > right - least
    side = "right" if on_left else "left"
    offset = -4 if on_left else 4
    axes.annotate(
        f"{100 * min_fraction:g}\u00a0% of the control's gain",
        (least, top),
        xytext=(offset, -8),
        textcoords="offset points",
        ha=side,
        color=INK,
        size=7.5,
    )


def _draw_bases(axes: Axes, summary: Summary) -> None:
    for x, y in _bases(summary).values():
        axes.plot(x, y, marker="+", color=INK, markersize=9, markeredgewidth=1.6)


def _bases(summary: Summary) -> dict[str, Position]:
    """Return name → position of the bases."""
    bases = {BASE: (0.0, 0.0)}
    quantized = quantized_base_position(summary)
    if quantized is not None:
        bases[QUANTIZED_BASE] = quantized
    return bases


def _draw(axes: Axes, trajectory: Trajectory) -> None:
    """Draw the path through the snapshots, other learning rates, truncations and the end."""
    end = trajectory.end.position
    style: Style = {"color": trajectory.color}
    by_step = sorted([*trajectory.snapshots, trajectory.end], key=lambda point: point.step)
    path = [trajectory.start, *(point.position for point in by_step)]
    dots: Style = {"linestyle": "none", "marker": "o", "markersize": 3.2, "zorder": 3}
    x, y = _columns(path)
    axes.plot(x, y, linewidth=1.3, alpha=0.85, zorder=2, **style)
    axes.plot(x[1:], y[1:], **dots, **style)
    square: Style = {"marker": "s", "markersize": 4.6, "markerfacecolor": "none"}
    for point in trajectory.rates:
        x, y = _columns([end, point.position])
        axes.plot(x, y, linewidth=0.8, linestyle=":", zorder=1, **style)
        axes.plot(*point.position, **square, zorder=3, **style)
    if trajectory.truncated:
        _draw_truncated(axes, trajectory, end)
    marker = "D" if trajectory.end.is_control else "o"
    axes.errorbar(
        *end,
        xerr=reaches([trajectory.end.gain]),
        yerr=reaches([trajectory.end.general]),
        marker=marker,
        markersize=7,
        elinewidth=1,
        capsize=2.5,
        zorder=4,
        **style,
    )


def _draw_truncated(axes: Axes, trajectory: Trajectory, end: Position) -> None:
    style: Style = {"color": trajectory.color}
    triangles: Style = {
        "linestyle": "none",
        "marker": "^",
        "markersize": 5,
        "markerfacecolor": "none",
        "zorder": 3,
    }
    positions = [point.position for point in trajectory.truncated]
    x, y = _columns([end, *positions])
    axes.plot(x, y, linewidth=0.9, linestyle="--", zorder=1, **style)
    axes.plot(x[1:], y[1:], **triangles, **style)


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
    shown = [label for label in labels if _is_inside(axes, label.at)]
    write_labels(axes, shown, obstacles)


def _labels(trajectory: Trajectory, *, with_steps: bool) -> list[Label]:
    """Return the labels of the model, its truncations and learning rates, and of its steps.

    Steps are the same for all models, so that only the first trajectory names them.
    """
    color = trajectory.color
    labels = [Label(trajectory.name, trajectory.end.position, color)]
    for point in trajectory.truncated:
        text = f"→ rank {point.rank}"
        labels.append(Label(text, point.position, color, is_main=False))
    for point in trajectory.rates:
        text = f"{point.learning_rate:g}"
        labels.append(Label(text, point.position, color, is_main=False))
    if with_steps:
        for point in trajectory.snapshots:
            text = f"{point.step} steps"
            labels.append(Label(text, point.position, color, is_main=False))
    return labels


def _obstacles(trajectory: Trajectory) -> list[Box]:
    """Return the boxes of its points and of the two error bars of its end, which are lines."""
    boxes: list[Box] = []
    for point in trajectory.points:
        boxes.append((*point.position, *point.position))
    x, y = trajectory.end.position
    gain = trajectory.end.gain
    general = trajectory.end.general
    horizontal = (gain.low, y, gain.high, y)
    vertical = (x, general.low, x, general.high)
    return [*boxes, horizontal, vertical]
