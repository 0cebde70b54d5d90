"""The held-out losses of a training by step: which weights are the best, and when to stop.

Every rank has the same history and decides alone, so that no rank waits for another that stopped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.training.log import Row

EVAL_LOSS = "eval_loss"
"""Key of the held-out loss in a row of metrics.jsonl; a row without an evaluation lacks it."""


@dataclass(frozen=True)
class EvalHistory:
    """The evaluations so far, by step."""

    losses: Sequence[tuple[int, float]] = ()
    """Step and held-out loss in nats per supervised token, in the order of the steps."""

    @classmethod
    def of_rows(cls, rows: Iterable[Row]) -> "EvalHistory":
        """Return the evaluations in the rows of metrics.jsonl."""
        return cls([(row["step"], row[EVAL_LOSS]) for row in rows if EVAL_LOSS in row])

    def extended(self, step: int, loss: float) -> "EvalHistory":
        """Return the history with one more evaluation.

        Args:
            step: number of steps taken, more than at the evaluations before.
            loss: nats per supervised token of the tuning examples.
        """
        return EvalHistory([*self.losses, (step, loss)])

    def until(self, step: int) -> "EvalHistory":
        """Return the history as it was after a step."""
        return EvalHistory([one for one in self.losses if one[0] <= step])

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best evaluation, the first one of equal ones; None before any."""
        return min(self.losses, key=lambda one: one[1], default=None)

    def is_exhausted(self, patience: int | None) -> bool:
        """Return whether the last `patience` evaluations did not improve on the best one."""
        if patience is None or self.best is None:
            return False
        since_best = len(self.losses) - 1 - self.losses.index(self.best)
        return since_best >= patience
