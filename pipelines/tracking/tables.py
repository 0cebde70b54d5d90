"""The report's tables on the MLflow pages, by file name: columns, and rows of data.

comparison      one row for each model, with few digits
metrics         each metric of each model, and how training and quantization changed it
benchmarks      each benchmark of each model
rules           each adapter's result on each rule of the gate
power           the statistical power of the items, of all benchmarks and of each
frontier        every scored model; snapshots and the like are not runs, to keep the run list short
provenance      what was trained on which data, and for how long
control_rates   the learning rates that were tried for the control
spectra         rank, effective rank, intruder dimensions and largest singular values of each update
"""

from collections.abc import Iterator, Mapping, Sequence

from pipelines.comparison.document import ModelSummary, Summary, TrainedModel
from pipelines.comparison.frontier import FrontierPoint
from pipelines.comparison.power import Power
from pipelines.reporting import page_sections
from pipelines.reporting.model_parts import judgment_of, status_of
from pipelines.reporting.report_metrics import ReportMetric, report_metrics
from pipelines.tracking.logged import EFFECTS, peak_rate
from pipelines.tracking.table_rows import (
    BenchmarkRow,
    IntervalCells,
    MetricRow,
    PointRow,
    PowerRow,
    ProvenanceRow,
    RateRow,
    RuleRow,
    SpectrumRow,
    Table,
    TableRow,
    table_of,
)
from pipelines.tracking.wide_table import wide_rows

Models = Mapping[str, ModelSummary]
MAX_SINGULAR_VALUES = 4
"""How many of the largest singular values of each update are listed."""


def tables(summary: Summary) -> dict[str, Table]:
    """Return the tables by file name; one without rows is left out."""
    rows_by_name: dict[str, Sequence[TableRow]] = {
        "comparison": list(wide_rows(summary)),
        "metrics": list(_metrics(summary.models)),
        "benchmarks": list(_benchmarks(summary.models)),
        "rules": list(_rules(summary.adapters)),
        "power": list(_power(summary.adapters)),
        "frontier": [_point(point) for point in summary.frontier],
        "provenance": list(_provenance(summary)),
        "control_rates": list(_control_rates(summary)),
        "spectra": list(_spectra(summary.models)),
    }
    return {f"{name}.json": table_of(rows) for name, rows in rows_by_name.items() if rows}


def _metrics(models: Models) -> Iterator[MetricRow]:
    """Yield a row for each model and metric."""
    metrics = report_metrics(models)
    for label, model in models.items():
        for metric in metrics:
            yield _metric_row(label, model, metric)


def _metric_row(label: str, model: ModelSummary, metric: ReportMetric) -> MetricRow:
    interval = IntervalCells.of(metric.interval(model))
    return MetricRow(
        model=label,
        figure=metric.name,
        unit=metric.unit,
        value=metric.value(model),
        value_low=interval.low,
        value_high=interval.high,
        by_training=IntervalCells.of(metric.change(model, "change")),
        in_all=IntervalCells.of(metric.change(model, "total")),
        verdict=status_of(model),
    )


def _benchmarks(models: Models) -> Iterator[BenchmarkRow]:
    """Yield a row for each model, benchmark and effect; base-nf4 changes by quantization."""
    for label, model in models.items():
        for benchmark in model.scores.benchmarks:
            for effect in EFFECTS:
                row = _benchmark_row(label, model, benchmark, effect)
                if row is not None:
                    yield row


def _benchmark_row(
    label: str, model: ModelSummary, benchmark: str, effect: str
) -> BenchmarkRow | None:
    """Return a row; None if the model does not have the effect, or it was not compared."""
    change = page_sections.benchmark_change(model, EFFECTS[effect], benchmark)
    if change is None:
        return None
    scores = model.scores.benchmarks[benchmark]
    return BenchmarkRow(
        model=label,
        benchmark=benchmark,
        effect=effect,
        mean=change.mean,
        low=change.low,
        high=change.high,
        p_value=change.p_value,
        adjusted_p=change.adjusted_p,
        choice_probability=scores.choice_probability,
        accuracy=scores.accuracy,
        items=scores.items,
        left_out=scores.left_out,
    )


def _rules(adapters: Models) -> Iterator[RuleRow]:
    """Yield a row for each adapter and rule, with the resulting verdict."""
    for label, model in adapters.items():
        verdict = judgment_of(model).verdict
        for rule in verdict.rules:
            yield RuleRow(label, rule.name, rule.status, rule.reason, verdict.status)


def _power(adapters: Models) -> Iterator[PowerRow]:
    """Yield a row for each adapter on all benchmarks, and on each benchmark if it is known."""
    for label, model in adapters.items():
        if model.power is None:
            continue
        powers: dict[str, Power] = {"all": model.power, **model.power.benchmarks}
        for name, power in powers.items():
            yield PowerRow(
                model=label,
                benchmark=name,
                items=power.items,
                needed=power.needed,
                smallest_drop=power.smallest_drop,
                enough=power.enough,
            )


def _point(point: FrontierPoint) -> PointRow:
    return PointRow(
        label=point.label,
        method=point.method,
        rank=point.rank,
        step=point.step,
        learning_rate=point.learning_rate,
        cut_from=point.cut_from,
        trained=point.trained,
        gain=IntervalCells.of(point.gain),
        general=IntervalCells.of(point.general),
    )


def _provenance(summary: Summary) -> Iterator[ProvenanceRow]:
    """Yield a row for each trained model."""
    for label, model in summary.models.items():
        if model.training is not None:
            yield _provenance_row(summary, label, model.training)


def _provenance_row(summary: Summary, label: str, training: TrainedModel) -> ProvenanceRow:
    totals = training.result.totals
    return ProvenanceRow(
        model=label,
        trained=page_sections.training_method(summary, label),
        learning_rate=peak_rate(summary, label),
        steps=totals.steps,
        tokens=totals.tokens,
        supervised_tokens=totals.supervised_tokens,
        first_loss=totals.first_loss,
        last_loss=totals.last_loss,
        training_seconds=totals.training_seconds,
        adapter_sha256=training.result.saved.adapter_sha256,
        base=summary.base.id,
        base_revision=summary.base.revision,
        data=summary.recipe.data.title,
        data_digest=summary.data.digest,
        commit=summary.commit,
        machine=summary.machine,
    )


def _control_rates(summary: Summary) -> Iterator[RateRow]:
    """Yield a row for each learning rate that was tried for the control."""
    for tried in page_sections.control_rates(summary):
        yield RateRow(tried.rate, tried.loss, tried.outcome)


def _spectra(models: Models) -> Iterator[SpectrumRow]:
    """Yield a row for each adapter and module."""
    for label, model in models.items():
        if model.training is None:
            continue
        for module in model.training.result.saved.spectrum:
            yield SpectrumRow(
                model=label,
                module=module.module,
                rank=module.rank,
                effective_rank=module.effective_rank,
                intruders=module.intruders,
                singular_value=module.values[:MAX_SINGULAR_VALUES],
            )
