"""Rows of the tables on the MLflow pages, and the tables that they make."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from pipelines.comparison.criterion import Status
from pipelines.comparison.resampling import Interval

Cell = str | float | None
"""A value of a table, as JSON stores it; an int or a bool counts as a float."""


@dataclass(frozen=True)
class TableRow:
    """A row of a table: each field is a cell, or several, in columns with the field's name."""

    def cells(self) -> dict[str, Cell]:
        """Return column → cell."""
        cells: dict[str, Cell] = {}
        for field in fields(self):
            name = field.name
            value = getattr(self, name)
            if isinstance(value, TableRow):
                cells |= {f"{name}_{inner}": cell for inner, cell in value.cells().items()}
            elif isinstance(value, tuple):
                cells |= {f"{name}_{number}": cell for number, cell in enumerate(value, start=1)}
            else:
                cells |= {name: value}
        return cells


@dataclass(frozen=True)
class IntervalCells(TableRow):
    """The cells of an interval, as a part of a row."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, interval: Interval | None) -> "IntervalCells":
        """Return the cells of an interval; they are empty without one."""
        if interval is None:
            return cls()
        return cls(interval.mean, interval.low, interval.high)


@dataclass(frozen=True)
class MetricRow(TableRow):
    """A metric of a model, and how training and quantization changed it."""

    model: str
    figure: str
    """Name of the metric."""
    unit: str
    value: float | None
    value_low: float | None
    value_high: float | None
    by_training: IntervalCells
    in_all: IntervalCells
    verdict: Status | None
    """Its status; None for a model that was not judged."""


@dataclass(frozen=True)
class BenchmarkRow(TableRow):
    """A model on a benchmark, and its change by one effect."""

    model: str
    benchmark: str
    effect: str
    mean: float
    low: float
    high: float
    p_value: float
    adjusted_p: float
    choice_probability: float | None
    accuracy: float | None
    items: int
    left_out: int


@dataclass(frozen=True)
class RuleRow(TableRow):
    """The result of a rule of the gate for an adapter."""

    model: str
    rule: str
    status: Status
    reason: str
    verdict: Status
    """Of all rules together."""


@dataclass(frozen=True)
class PowerRow(TableRow):
    """What an adapter's items can detect on a benchmark."""

    model: str
    benchmark: str
    """all for all of them together."""
    items: int
    needed: int | None
    smallest_drop: float
    enough: bool | None


@dataclass(frozen=True)
class PointRow(TableRow):
    """A scored model on the frontier."""

    label: str
    method: str
    rank: int | None
    step: int
    learning_rate: float
    cut_from: int | None
    trained: bool
    gain: IntervalCells
    general: IntervalCells


@dataclass(frozen=True)
class ProvenanceRow(TableRow):
    """How a model was trained, on which base and data, and for how long."""

    model: str
    trained: str
    learning_rate: float
    steps: int
    tokens: int
    supervised_tokens: int
    first_loss: float
    last_loss: float
    training_seconds: float
    adapter_sha256: str | None
    base: str
    base_revision: str
    data: str
    data_digest: str
    commit: str
    machine: str


@dataclass(frozen=True)
class RateRow(TableRow):
    """A learning rate that was tried for the control."""

    rate: str
    loss: float | None
    """On the tuning examples, nats per supervised token; None if training diverged."""
    outcome: str
    """chosen, diverged, or empty."""


@dataclass(frozen=True)
class SpectrumRow(TableRow):
    """The singular values of a module's update."""

    model: str
    module: str
    rank: int
    effective_rank: float
    intruders: int | None
    """Intruder dimensions; None in layers in which they were not counted."""
    singular_value: tuple[float, ...]
    """The largest ones; each has its own column."""


@dataclass(frozen=True)
class Table:
    """A table in the format of MLflow's pages."""

    columns: list[str]
    data: list[list[Cell]]


def table_of(rows: Sequence[TableRow]) -> Table:
    """Return the table of some rows; a cell that a row does not have is empty."""
    cells = [row.cells() for row in rows]
    names: dict[str, None] = {}  # an ordered set
    for row in cells:
        names |= dict.fromkeys(row)
    columns = list(names)
    return Table(columns, [[row.get(name) for name in columns] for row in cells])
