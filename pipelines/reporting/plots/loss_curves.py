"""Training and held-out loss by step, of each training that was evaluated on the way.

The held-out loss decides which step's weights are saved. It rises again where a training overfits,
while the training loss keeps falling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipelines.comparison.comparison import CONTROL
from pipelines.comparison.document import Summary
from pipelines.reporting.plots.drawing import (
    CONTROL_COLOR,
    GRID,
    INK,
    VARIABLES,
    color_of,
    drawing,
    svg,
)
from pipelines.runtime.interfaces.results import HeldOutLosses

INCHES = (10.8, 3.6)


@dataclass(frozen=True)
class LossCurve:
    """The evaluations of one model's training."""

    label: str
    color: str
    held_out: HeldOutLosses

    @property
    def variable(self) -> str:
        """Name of the color among the page's CSS variables."""
        return VARIABLES[self.color]

    @property
    def steps(self) -> list[int]:
        """The evaluated steps."""
        return [one.step for one in self.held_out.losses]


def loss_curves(summary: Summary) -> list[LossCurve]:
    """Return the curves of every model whose training was evaluated; usually of all or none."""
    trained = {}
    for label, model in summary.models.items():
        if model.training is not None:
            trained[label] = model.training
    ranks = [one.rank for label, one in trained.items() if label != CONTROL and one.rank]
    curves = []
    for label, training in trained.items():
        held_out = training.result.held_out
        if held_out is None:
            continue
        color = CONTROL_COLOR
        if label != CONTROL and training.rank is not None:
            color = color_of(training.rank, ranks)
        curves.append(LossCurve(label, color, held_out))
    return curves


def plot_losses(curves: Sequence[LossCurve]) -> str:
    """Return the plot as SVG; empty without curves.

    Solid lines are the held-out loss, with a dot at the step whose weights are saved. Dashed lines
    are the mean training loss since the previous evaluation.
    """
    if not curves:
        return ""
    with drawing("losses", INCHES) as figure:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.065, right=0.99, top=0.97, bottom=0.14)
        for curve in curves:
            _draw_curve(axes, curve)
        axes.set_xlabel("Step", color=INK)
        axes.set_ylabel("Loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        return svg(figure, "losses", "Training and held-out loss by step")


def _draw_curve(axes: Axes, curve: LossCurve) -> None:
    held_out = curve.held_out
    eval_losses = [one.eval_loss for one in held_out.losses]
    train_losses = [one.train_loss for one in held_out.losses]
    points: dict[str, Any] = {"color": curve.color, "marker": ".", "markersize": 4}
    axes.plot(curve.steps, eval_losses, linewidth=1.4, **points)
    axes.plot(curve.steps, train_losses, linewidth=0.9, linestyle="--", alpha=0.8, **points)
    axes.plot(
        held_out.best_step,
        held_out.best_eval_loss,
        color=curve.color,
        marker="o",
        markersize=7,
    )
