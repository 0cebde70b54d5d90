"""What a verification of the way of reading found; see `pipelines.models.equivalence`. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verified:
    """The way that was taken, and how well it agrees with the model's own forward."""

    path: str
    """packed, or one by one."""
    own_head: bool
    """The model forms its own logits; else the head is a product in closed form."""
    examples: int
    """That were read both ways."""
    longest: int
    """Tokens of the longest of them."""
    loss_difference: float
    """Largest of any example, nats a token."""
    gradient_difference: float | None
    """Largest of any tensor, of its norm; None where no gradient was compared."""
    loss_tolerance: float
    gradient_tolerance: float
    rejected: tuple[str, ...] = ()
    """Why faster ways were not taken."""
    without_gradient: tuple[str, ...] = ()
    """What is trained and took no part in the loss."""
    seconds: float = 0.0
    """That the verification took."""

    def figures(self) -> dict[str, Any]:
        """Return plain values for a stage's result."""
        return {
            **asdict(self),
            "rejected": list(self.rejected),
            "without_gradient": list(self.without_gradient),
        }

    def __str__(self) -> str:
        return sentence(self.figures())


def sentence(figures: Mapping[str, Any]) -> str:
    """Return what a log, a report and a model card say of a verified way, from its plain values."""
    way = (
        "fast path (packed)" if figures["path"] == "packed" else "slow path (one example at a time)"
    )
    many = f"{figures['examples']} example{'s' * (figures['examples'] != 1)} of up to {figures['longest']:,} tokens"
    gradient = figures["gradient_difference"]
    also = "" if gradient is None else f", gradients within {gradient:.0e} of their norm"
    text = f"{way} matches the model's own forward: {figures['loss_difference']:.0e} nats per token on {many}{also}"
    return text + "".join(f"; {reason}" for reason in figures["rejected"])
