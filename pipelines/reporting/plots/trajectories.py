"""The trajectories in the frontier plot: each trained model with the rows that belong to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.comparison.comparison import CONTROL, QUANTIZED_BASE
from pipelines.reporting.plots.drawing import CONTROL_COLOR, VARIABLES, color_of

Summary = Mapping[str, Any]
Row = Mapping[str, Any]
Position = tuple[float, float]
"""Task gain and general change."""


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
    name = CONTROL if is_control else f"rank {end['rank']}"
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
        name=name,
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
    return quantized_base_position(summary) or (0.0, 0.0)


def quantized_base_position(summary: Summary) -> Position | None:
    """Return the position of the 4-bit base; None if there is none."""
    model = summary["models"].get(QUANTIZED_BASE)
    if model is None:
        return None
    return model["change"]["task_gain"]["mean"], 0.0


def position_of(row: Row) -> Position:
    """Return the position of a row's means."""
    gain = row["gain"]["mean"]
    general = row["general"]["mean"]
    return gain, general
