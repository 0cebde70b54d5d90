"""How examples are read, and how well that agrees with the model's own forward."""

from pipelines.runtime.interfaces.values import Values

PACKED_PATH = "packed"
ONE_BY_ONE = "one by one"


class Rounding(Values):
    """How far products in 16 bits move a loss and a gradient from float32."""

    loss: float
    """Mean over the examples, nats per token."""
    gradient: float | None
    """Of all trained tensors together, relative to its norm; None if none was small enough to
    keep."""


class Verified(Values):
    """The reader that is used, and how well it agrees with the model's own forward; see
    `pipelines.models.equivalence`."""

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
    rounding: Rounding | None = None
    """Of products in 16 bits, if these are computed next to states in float32."""
    rejected: tuple[str, ...] = ()
    """Why faster readers are not used."""
    without_gradient: tuple[str, ...] = ()
    """Trained tensors that do not affect the loss."""
    seconds: float = 0.0
    """Duration of the verification."""
    verified_by: str | None = None
    """The earlier training of the same base, data and method that verified it; None if this one
    did."""

    @property
    def is_packed(self) -> bool:
        """Whether several examples are read in one pass."""
        return self.path == PACKED_PATH

    def __str__(self) -> str:
        path = "fast path (packed)" if self.is_packed else "slow path (one example at a time)"
        plural = "s" if self.examples != 1 else ""
        examples = f"{self.examples} example{plural} of up to {self.longest:,} tokens"
        text = f"{path} matches the model's own forward: "
        text += f"{self.loss_difference:.0e} nats per token on {examples}"
        if self.gradient_difference is not None:
            text += f", gradients within {self.gradient_difference:.0e} of their norm"
        if self.rounding is not None:
            text += f"; products in 16 bits change the loss by {self.rounding.loss:.0e}"
            if self.rounding.gradient is not None:
                text += f" and the gradient by {self.rounding.gradient:.0e}"
        if self.verified_by is not None:
            text += f", verified by the training of {self.verified_by}"
        return "; ".join([text, *self.rejected])
