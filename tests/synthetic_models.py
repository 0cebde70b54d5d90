"""Models for the tests of the comparison: how well each one learned and remembers."""

from dataclasses import dataclass

from summary_parts import facts, totals

from pipelines.comparison.comparison import ComparedModel
from pipelines.runtime.interfaces.results import TrainResult

ITEMS = 40
"""Held-out examples of a model, and questions of each of its benchmarks."""


@dataclass(frozen=True)
class SyntheticModel:
    """A model from which item records are generated."""

    loss: float
    """Mean loss per token."""
    probability: float
    """Mean probability of the right answer."""
    noise: float = 0.01
    """Standard deviation of that probability over items."""


BASE = SyntheticModel(4.0, 0.60)
NF4 = SyntheticModel(4.3, 0.57)
CONTROL = SyntheticModel(3.0, 0.60)
GOOD = SyntheticModel(3.3, 0.57)
BETTER = SyntheticModel(3.2, 0.57)
IDLE = SyntheticModel(4.0, 0.57)
FORGETFUL = SyntheticModel(3.0, 0.45)
UNCLEAR = SyntheticModel(3.2, 0.56, noise=0.25)
WITH_ONE_ADAPTER = {"base": BASE, "base-nf4": NF4, "control": CONTROL, "rank-2": GOOD}
"""Label → model, for a comparison of one adapter over a 4-bit base."""


def compared_model(label: str, rank: int | None) -> ComparedModel:
    """Return a trained model with the training result that the comparison reads."""
    values = {
        "facts": facts(weights=1000),
        "totals": totals(loss=1.0),
        "saved": {"file_bytes": 1_000_000, "adapter_sha256": f"digest of {label}"},
        "checkpoints": {"written": 0, "seconds": 0.0, "background_seconds": 0.0},
        "peak_memory_bytes": 1,
    }
    result = TrainResult.model_validate(values)
    return ComparedModel(label, rank, f"key of {label}", f"runs/{label}", result)


def control_and_adapter() -> list[ComparedModel]:
    """Return a control and an adapter of rank 2."""
    return [compared_model("control", None), compared_model("rank-2", 2)]
