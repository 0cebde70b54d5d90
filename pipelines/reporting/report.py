"""The report of a comparison: a terminal table, a Markdown table and a self-contained HTML page.

All three read the content of summary.json and show the same columns, which are declared here
once. The page needs no other file: its plots are inline SVG, its style is in the file, and all text
that a model wrote is escaped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from lora_core.files import write_text
from pipelines.comparison.comparison import BASE, QUANTIZED_BASE
from pipelines.comparison.document import ModelSummary, Summary
from pipelines.comparison.resampling import Interval
from pipelines.config.alias_names import CHAMPION, PROPOSED
from pipelines.reporting import formats, item_records, page_sections, words
from pipelines.reporting.formats import interval_text, short_count, short_size, signed
from pipelines.reporting.grid_rows import grid_rows
from pipelines.reporting.model_parts import against_base, status_of
from pipelines.reporting.origin import RunOrigin
from pipelines.reporting.plots.frontier_plot import outside, plot_frontier
from pipelines.reporting.plots.loss_curves import loss_curves, plot_losses
from pipelines.reporting.plots.rank_plot import plot_ranks
from pipelines.reporting.plots.strips import SHADES, Strip, strips
from pipelines.reporting.plots.trajectories import trajectories
from pipelines.reporting.report_metrics import (
    MIN_ANSWERS,
    benchmark_score,
    general_change,
    report_metrics,
    unmeasured,
)
from pipelines.runtime.interfaces.results import TrainResult

NOTHING = "–"
COLORS = {"pass": "green", "reject": "red", "can't tell": "yellow"}
PAGE = Path(__file__).parent / "page"
FILTERS = ("minus_signs", "signed", "number", "ends", "duration", "p_value", "is_clear", "rate")
"""Functions of `formats` that the templates use."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Column(Generic[Value]):
    """One column of the tables."""

    key: str
    """Value of the page's data-figure attribute."""
    title: str
    extract: Callable[[ModelSummary], Value | None]
    """Takes the value from a model's entry; returns None if the entry has none."""
    format: Callable[[Value], str]

    @property
    def is_text(self) -> bool:
        return self.key == "verdict"

    def text(self, model: ModelSummary) -> str:
        """Return the formatted value; a dash if the entry has none."""
        value = self.extract(model)
        return NOTHING if value is None else self.format(value)


def _trained(extract: Callable[[TrainResult], Value]) -> Callable[[ModelSummary], Value | None]:
    """Return a function that takes a value from the result of a model's training."""

    def extract_if_trained(model: ModelSummary) -> Value | None:
        return None if model.training is None else extract(model.training.result)

    return extract_if_trained


def _task_gain(model: ModelSummary) -> Interval | None:
    effect = against_base(model)
    return None if effect is None else effect.task_gain


COLUMNS: tuple[Column[Any], ...] = (
    Column(
        "trained_weights",
        "Trained weights",
        _trained(lambda result: result.facts.trained_weights),
        short_count,
    ),
    Column("file_bytes", "File", _trained(lambda result: result.saved.file_bytes), short_size),
    Column("task_loss", "Task loss", lambda model: model.scores.task_loss, "{:.3f}".format),
    Column("task_gain", "Task gain", _task_gain, lambda gain: signed(gain.mean)),
    Column("general_change", "General change", general_change, interval_text),
    Column("verdict", "Verdict", status_of, str),
    Column(
        "tokens_per_second",
        "Tokens/s",
        _trained(lambda result: result.totals.tokens_per_second),
        short_count,
    ),
    Column(
        "peak_memory_bytes",
        "Peak memory",
        _trained(lambda result: result.peak_memory_bytes),
        short_size,
    ),
)


def terminal_table(summary: Summary) -> Table:
    """Return one row per model of summary.json, for a terminal of 100 columns or more."""
    table = Table(
        title=summary.name,
        caption=Text("\n".join(_remarks(summary))),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.title_style = "bold"
    table.caption_justify = "left"
    table.add_column("Model", no_wrap=True)
    for column in COLUMNS:
        title = column.title.replace(" ", "\n")
        if column.is_text:
            table.add_column(title, justify="left", no_wrap=False, min_width=10)
        else:
            table.add_column(title, justify="right", no_wrap=True)
    for label, cells in _rows(summary):
        texts = [Text(cell, style=_cell_style(cell)) for cell in cells]
        table.add_row(label, *texts, style=_row_style(summary, label))
    return table


def _cell_style(cell: str) -> str:
    status = cell.partition(",")[0]
    return COLORS.get(status, "")


def _row_style(summary: Summary, label: str) -> str:
    if label in (BASE, QUANTIZED_BASE):
        return "dim"
    return "bold" if label == summary.champion else ""


def markdown_table(summary: Summary) -> str:
    """Return the same table in GitHub Markdown, below the headline and above the remarks."""
    decision, *remarks = _remarks(summary)
    titles = ["Model", *(column.title for column in COLUMNS)]
    rules = ["---"]
    for column in COLUMNS:
        rule = "---" if column.is_text else "---:"
        rules.append(rule)
    lines = [f"**{words.headline(summary)}**", "", f"Decision: {decision}", ""]
    lines += [_markdown_row(titles), _markdown_row(rules)]
    for label, cells in _rows(summary):
        lines.append(_markdown_row([label, *cells]))
    for remark in remarks:
        lines += ["", remark]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_html(summary: Summary, path: Path, origin: RunOrigin | None = None) -> None:
    """Write the complete comparison as one page that needs no other file.

    Args:
        summary: sample answers are read from the item files that it names.
        path: the .html file; replaced once the new page is complete.
        origin: who ran it, when and where; None leaves that out.
    """
    found = trajectories(summary)
    frontier = plot_frontier(summary) if found else ""
    losses = loss_curves(summary)
    template = _environment().get_template("report.html.jinja")
    page = template.render(
        summary=summary,
        origin=origin,
        min_answers=MIN_ANSWERS,
        columns=COLUMNS,
        words=words,
        sections=page_sections,
        metrics=report_metrics(summary.models),
        grid_rows=grid_rows(summary.grid),
        unmeasured=unmeasured(summary.models),
        benchmark_score=benchmark_score,
        general_change=general_change,
        left_out=item_records.left_out(summary),
        trajectories=found,
        spectra=_spectra(summary),
        shades=SHADES,
        samples=item_records.samples(summary),
        plot_frontier=frontier,
        outside=outside(summary) if found else [],
        plot_ranks=plot_ranks(summary),
        loss_curves=losses,
        plot_losses=plot_losses(losses),
    )
    write_text(path, page)


@cache
def _environment() -> Environment:
    """Return the environment that compiles the templates, created once."""
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in FILTERS:
        environment.filters[name] = getattr(formats, name)
    environment.filters["count"] = short_count
    environment.tests["interval"] = lambda value: isinstance(value, Interval)
    return environment


def _spectra(summary: Summary) -> dict[str, list[Strip]]:
    """Return label → the strips of its updates, for each model whose spectra are known."""
    spectra = {}
    for label, model in summary.models.items():
        if model.training is not None and model.training.result.saved.spectrum:
            spectra[label] = strips(model.training.result.saved.spectrum)
    return spectra


def _remarks(summary: Summary) -> list[str]:
    """Return the lines below the table, from the decision to the legend."""
    texts = [
        summary.decision,
        words.recommended_text(summary),
        *page_sections.undecided(summary),
        words.grid_text(summary),
        summary.control.words,
        words.registered_text(summary),
        words.verified_text(summary),
        words.legend(summary),
    ]
    return [text for text in texts if text]


def _rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """Return label and cells of each model."""
    role = PROPOSED if summary.recipe.registry.promote == "propose" else CHAMPION
    rows = []
    for label, model in summary.models.items():
        cells = []
        for column in COLUMNS:
            mark = f", {role}" if column.is_text and label == summary.champion else ""
            cells.append(column.text(model) + mark)
        rows.append((label, cells))
    return rows
