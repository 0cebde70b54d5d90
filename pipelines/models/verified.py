"""The result of verifying a reader; see `pipelines.models.equivalence`. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

PACKED_PATH = "packed"
ONE_BY_ONE = "one by one"


class Verified(BaseModel, frozen=True, extra="forbid"):
    """The reader that is used, and how well it agrees with the model's own forward."""

    path: str
    """packed, or one by one."""
    own_head: bool
    """The model computes its own logits; else the head is a product in closed form."""
    examples: int
    """Examples that were read by both."""
    longest: int
    """Tokens of the longest of them."""
    loss_difference: float
    """Largest of any example, nats per token."""
    gradient_difference: float | None
    """Largest of any tensor, relative to its norm; None if no gradient was compared."""
    loss_tolerance: float
    gradient_tolerance: float
    rejected: tuple[str, ...] = ()
    """Why faster readers are not used."""
    without_gradient: tuple[str, ...] = ()
    """Trained tensors that do not affect the loss."""
    seconds: float = 0.0
    """Duration of the verification."""
    verified_by: str | None = None
    """The earlier training of the same base, data and method that verified it; None if this one
    did."""

    def figures(self) -> dict[str, Any]:
        """Return plain values for a stage's result."""
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        return sentence(self.figures())


def sentence(figures: Mapping[str, Any]) -> str:
    """Describe a verified reader for a log, a report or a model card, from its plain values."""
    is_packed = figures["path"] == PACKED_PATH
    path = "fast path (packed)" if is_packed else "slow path (one example at a time)"
    plural = "s" if figures["examples"] != 1 else ""
    examples = f"{figures['examples']} example{plural} of up to {figures['longest']:,} tokens"
    text = f"{path} matches the model's own forward: "
    text += f"{figures['loss_difference']:.0e} nats per token on {examples}"
    gradient = figures["gradient_difference"]
    if gradient is not None:
        text += f", gradients within {gradient:.0e} of their norm"
    if figures["verified_by"] is not None:
        text += f", verified by the training of {figures['verified_by']}"
    return "; ".join([text, *figures["rejected"]])
