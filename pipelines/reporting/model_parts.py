"""The parts of a summary that only some models have, for code that knows that they exist."""

from typing import Literal

from pipelines.comparison.criterion import Status
from pipelines.comparison.document import (
    Effect,
    ForwardChecks,
    Judgment,
    ModelSummary,
    TrainedModel,
)
from pipelines.comparison.frontier import FrontierPoint
from pipelines.runtime.interfaces.verified import Verified

EffectName = Literal["change", "total"]
"""By training, or from the base in full precision."""


def training_of(model: ModelSummary) -> TrainedModel:
    """Return how a model was trained; it is not a base."""
    assert model.training is not None, "only a base has no training"
    return model.training


def judgment_of(model: ModelSummary) -> Judgment:
    """Return an adapter's comparison with the control, and its verdict."""
    assert model.judgment is not None, "every adapter is judged"
    return model.judgment


def total_of(model: ModelSummary) -> Effect:
    """Return how a trained model differs from the base in full precision."""
    assert model.total is not None, "every trained model has a total change"
    return model.total


def rank_of(point: FrontierPoint) -> int:
    """Return the rank of an adapter on the frontier, or of a truncated one."""
    assert point.rank is not None, "only full fine-tuning has no rank"
    return point.rank


def effect_of(model: ModelSummary, name: EffectName) -> Effect | None:
    """Return an effect on a model; None if the model does not have it.

    Args:
        model: the model's entry in the summary.
        name: which of the two effects.
    """
    return model.change if name == "change" else model.total


def against_base(model: ModelSummary) -> Effect | None:
    """Return the difference from the base in full precision; None for that base itself.

    The 4-bit base differs from it by quantization only.
    """
    return model.change if model.total is None else model.total


def status_of(model: ModelSummary) -> Status | None:
    """Return the status of an adapter's verdict; None if the model was not judged."""
    return None if model.judgment is None else model.judgment.verdict.status


def verified_readers(checks: ForwardChecks) -> dict[str, Verified]:
    """Return what was verified of a model, training or scoring, and the result."""
    readers = {"training": checks.training, "scoring": checks.scoring}
    return {what: result for what, result in readers.items() if result is not None}
