"""The comparison in one table: a row for each model, with few digits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipelines.comparison.document import ModelSummary, Summary
from pipelines.comparison.resampling import Interval
from pipelines.reporting.formats import interval_text, short_count
from pipelines.reporting.model_parts import against_base, status_of
from pipelines.reporting.report_metrics import benchmark_score, general_change
from pipelines.reporting.words import learning_rate
from pipelines.tracking.table_rows import Cell, TableRow

DIGITS = 3
"""Decimals of a score."""


@dataclass(frozen=True)
class WideRow(TableRow):
    """A model with everything that decides."""

    model: str
    rank: int | None
    """None for a base and for full fine-tuning."""
    verdict: str
    gain: str
    """On the task since the base, with its interval."""
    general_change: str
    """By training, with its interval."""
    task_loss: float
    general: float | None
    """Choice probability, or accuracy if no question has choices."""
    learning_rate: float | None
    weights: str
    """Number of trained weights."""
    minutes: float | None
    benchmarks: dict[str, float | None]
    """Each has its own column."""

    def cells(self) -> dict[str, Cell]:
        """Return column → cell."""
        cells = super().cells()
        del cells["benchmarks"]
        return cells | self.benchmarks


def wide_rows(summary: Summary) -> Iterator[WideRow]:
    """Yield the row of each model."""
    for label, model in summary.models.items():
        yield _row(summary, label, model)


def _row(summary: Summary, label: str, model: ModelSummary) -> WideRow:
    effect = against_base(model)
    benchmarks = {}
    for name, scores in model.scores.benchmarks.items():
        benchmarks[name] = _rounded(benchmark_score(scores))
    row = WideRow(
        model=label,
        rank=None,
        verdict=status_of(model) or "",
        gain=_interval(None if effect is None else effect.task_gain),
        general_change=_interval(general_change(model)),
        task_loss=round(model.scores.task_loss, DIGITS),
        general=_rounded(benchmark_score(model.scores)),
        learning_rate=learning_rate(summary, label),
        weights="",
        minutes=None,
        benchmarks=benchmarks,
    )
    if model.training is None:
        return row
    result = model.training.result
    return replace(
        row,
        rank=model.training.rank,
        weights=short_count(result.facts.trained_weights),
        minutes=round(result.totals.training_seconds / 60, 1),
    )


def _interval(change: Interval | None) -> str:
    return "" if change is None else interval_text(change)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
