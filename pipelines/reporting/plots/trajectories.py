"""The trajectories in the frontier plot: each trained model with the points that belong to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.comparison.comparison import CONTROL, QUANTIZED_BASE
from pipelines.comparison.document import Summary
from pipelines.comparison.frontier import FrontierPoint
from pipelines.comparison.resampling import Interval
from pipelines.reporting.model_parts import rank_of
from pipelines.reporting.plots.drawing import CONTROL_COLOR, VARIABLES, color_of

Position = tuple[float, float]
"""Task gain and general change."""


@dataclass(frozen=True)
class ScoredPoint(FrontierPoint):
    """A point of the frontier whose general abilities were scored."""

    general: Interval

    @property
    def position(self) -> Position:
        """The means of its intervals."""
        return self.gain.mean, self.general.mean

    @property
    def is_control(self) -> bool:
        """Whether it is the control itself."""
        return self.label == CONTROL

    @property
    def scored_label(self) -> str:
        """Label of the model of which it may be a snapshot."""
        return self.label.partition("@")[0]

    @property
    def trained_label(self) -> str:
        """Label of the model that it is at another learning rate."""
        return self.scored_label.partition(" lr ")[0]


@dataclass(frozen=True)
class Trajectory:
    """One trained model with everything that was scored during its training or derived from it."""

    label: str
    name: str
    color: str
    start: Position
    """Position of the base it was trained on."""
    end: ScoredPoint
    """The model itself."""
    snapshots: Sequence[ScoredPoint]
    """By step, without the end."""
    rates: Sequence[ScoredPoint]
    """The same training at other learning rates."""
    truncated: Sequence[ScoredPoint]
    """The same adapter truncated to lower ranks, the highest rank first."""

    @property
    def variable(self) -> str:
        """Name of the color among the page's CSS variables."""
        return VARIABLES[self.color]

    @property
    def points(self) -> list[ScoredPoint]:
        """All points that belong to the model."""
        others = [*self.snapshots, *self.rates, *self.truncated]
        return [self.end, *others]


def trajectories(summary: Summary) -> list[Trajectory]:
    """Return the trajectories of the control and of each adapter, from the frontier.

    There are none if no general ability was scored.
    """
    trained: list[ScoredPoint] = []
    others: list[ScoredPoint] = []
    for point in summary.frontier:
        if point.general is None:
            continue
        group = trained if point.trained else others
        group.append(ScoredPoint(**vars(point)))
    ranks = [rank_of(end) for end in trained if not end.is_control]
    found = []
    for end in trained:
        start = _start(summary, end)
        color = CONTROL_COLOR if end.is_control else color_of(rank_of(end), ranks)
        found.append(_trajectory(end, others, color=color, start=start))
    return found


def _trajectory(
    end: ScoredPoint, others: Sequence[ScoredPoint], *, color: str, start: Position
) -> Trajectory:
    """Return the trajectory that leads to `end`, from the points that are not trained models."""
    truncated: list[ScoredPoint] = []
    snapshots: list[ScoredPoint] = []
    rates: list[ScoredPoint] = []
    for point in others:
        if point.cut_from is not None:
            if point.cut_from == end.rank and not end.is_control:
                truncated.append(point)
        elif end.label in (point.scored_label, point.trained_label):
            same_rate = point.learning_rate == end.learning_rate
            siblings = snapshots if same_rate else rates
            siblings.append(point)
    return Trajectory(
        label=end.label,
        name=CONTROL if end.is_control else end.label.replace("rank-", "rank ", 1),
        color=color,
        start=start,
        end=end,
        snapshots=sorted(snapshots, key=lambda point: point.step),
        rates=sorted(rates, key=lambda point: point.learning_rate),
        truncated=sorted(truncated, key=lambda point: -rank_of(point)),
    )


def _start(summary: Summary, end: ScoredPoint) -> Position:
    if end.is_control and summary.control.method == "full":
        return 0.0, 0.0
    return quantized_base_position(summary) or (0.0, 0.0)


def quantized_base_position(summary: Summary) -> Position | None:
    """Return the position of the 4-bit base; None if there is none."""
    model = summary.models.get(QUANTIZED_BASE)
    if model is None:
        return None
    assert model.change is not None, "the 4-bit base is changed by quantization"
    return model.change.task_gain.mean, 0.0
