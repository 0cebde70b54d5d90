"""The metrics of one step of a training, as MLflow shows them."""

from collections.abc import Collection, Iterator

from pydantic import BaseModel, ConfigDict, Field

MetricPoint = tuple[str, float, int, int]
"""A metric's name, value, time (milliseconds since 1970) and step."""


class StepMetrics(BaseModel):
    """What is shown of a row of metrics.jsonl; an older row lacks some of it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    step: int
    time: float
    """When the step ended, seconds since 1970."""
    seconds: float
    """Duration since the previous row."""
    loss: float | None = None
    """Nats per supervised token."""
    eval_loss: float | None = None
    """The same on the held-out tuning examples, if they were evaluated after this step."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    seconds_of: dict[str, float | None] = Field(default_factory=dict)
    """Phase of the step → its duration."""

    def points(self, names: Collection[str] = ()) -> Iterator[MetricPoint]:
        """Yield a point for each metric that the row has.

        Args:
            names: of some metrics; empty for all.
        """
        values = {
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        for phase, seconds in self.seconds_of.items():
            values[f"seconds_{phase}"] = seconds
        milliseconds = int(1000 * self.time)
        for name, value in values.items():
            if value is not None and (not names or name in names):
                yield f"train/{name}", value, milliseconds, self.step
