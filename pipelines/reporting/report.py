"""The report of a comparison: a table for the terminal, one for a workflow's page, and a page of HTML to hand on.

All three read the plain values of summary.json and show the same columns, which are declared here once. The page needs
nothing beside itself: its plots are inline SVG, its style is in the file, and whatever a model wrote is escaped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from lora_core.files import write_text
from pipelines.comparison.comparison import BASE, QUANTIZED_BASE
from pipelines.reporting import formats, page_sections, words
from pipelines.reporting.figures import benchmark_figure, figures, general_change, unmeasured
from pipelines.reporting.formats import interval_text, short_count, short_size, signed
from pipelines.reporting.plots.frontier_plot import plot_frontier, ways
from pipelines.reporting.plots.rank_plot import plot_ranks
from pipelines.reporting.plots.strips import SHADES, strips

NOTHING = "–"
COLOURS = {"pass": "green", "reject": "red", "can't tell": "yellow"}
PAGE = Path(__file__).parent / "page"
Model = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of the tables."""

    key: str
    """Names the figure in the page's data-figure."""
    title: str
    find: Callable[[Model], Any]
    """Takes the figure from a model's entry; None where it has none."""
    show: Callable[[Any], str]


def _trained(name: str) -> Callable[[Model], Any]:
    return lambda model: model.get("figures", {}).get(name)


COLUMNS = (
    Column("trained_weights", "Trained weights", _trained("trained_weights"), short_count),
    Column("file_bytes", "File", _trained("file_bytes"), short_size),
    Column("task_loss", "Task loss", lambda model: model["scores"]["task_loss"], "{:.3f}".format),
    Column(
        "task_gain",
        "Task gain",
        lambda model: page_sections.against_base(model).get("task_gain"),
        lambda gain: signed(gain["mean"]),
    ),
    Column("general_change", "General change", general_change, interval_text),
    Column("verdict", "Verdict", lambda model: model.get("verdict", {}).get("status"), str),
    Column("tokens_per_second", "Tokens/s", _trained("tokens_per_second"), short_count),
    Column("peak_memory_bytes", "Peak memory", _trained("peak_memory_bytes"), short_size),
)


def terminal_table(summary: dict[str, Any]) -> Table:
    """Return one row per model of summary.json, for a terminal of 100 columns or more."""
    table = Table(
        title=summary["name"],
        caption=Text("\n".join(_remarks(summary))),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.title_style, table.caption_justify = "bold", "left"
    table.add_column("Model", no_wrap=True)
    for column in COLUMNS:
        is_text = column.key == "verdict"
        table.add_column(
            column.title.replace(" ", "\n"),
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            min_width=10 if is_text else None,
        )
    for label, cells in _rows(summary):
        style = (
            "dim"
            if label in (BASE, QUANTIZED_BASE)
            else "bold"
            if label == summary["champion"]
            else ""
        )
        texts = [Text(text, style=COLOURS.get(text.partition(",")[0], "")) for text in cells]
        table.add_row(label, *texts, style=style)
    return table


def markdown_table(summary: dict[str, Any]) -> str:
    """Return the same table as GitHub Markdown, with the headline above and the remarks below it."""
    decision, *remarks = _remarks(summary)
    lines = [
        f"**{words.headline(summary)}**",
        "",
        f"Decision: {decision}",
        "",
        "| " + " | ".join(["Model", *(column.title for column in COLUMNS)]) + " |",
        "| "
        + " | ".join(["---", *("---" if column.key == "verdict" else "---:" for column in COLUMNS)])
        + " |",
        *("| " + " | ".join([label, *cells]) + " |" for label, cells in _rows(summary)),
    ]
    return "\n".join([*lines, *(f"\n{remark}" for remark in remarks)]) + "\n"


def write_html(summary: dict[str, Any], path: Path) -> None:
    """Write the whole comparison as one page that needs no other file.

    Args:
        summary: the plain values of summary.json; the item files that it names are read for sample answers.
        path: the .html file; replaced when complete.
    """
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            summary=summary,
            columns=COLUMNS,
            words=words,
            sections=page_sections,
            figures=figures(summary["models"]),
            unmeasured=unmeasured(summary["models"]),
            benchmark_figure=benchmark_figure,
            general_change=general_change,
            left_out=page_sections.left_out(summary),
            ways=ways(summary),
            spectra={label: strips(modules) for label, modules in summary["spectrum"].items()},
            shades=SHADES,
            samples=page_sections.samples(summary),
            plot_frontier=plot_frontier(summary) if ways(summary) else "",
            plot_ranks=plot_ranks(summary),
        )
    )
    write_text(path, page)


@cache
def _environment() -> Environment:
    """Return what compiles the templates, once."""
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(formats, name)
        for name in ("signed", "number", "ends", "duration", "p_value", "is_clear", "rate")
    }
    environment.filters["count"] = short_count
    return environment


def _remarks(summary: Mapping[str, Any]) -> list[str]:
    """Return what stands below the table: the decision, the rank to use, what can't be told, the control, the registry, the legend."""
    texts = [
        summary["decision"],
        words.recommended_text(summary),
        *page_sections.undecided(summary),
        summary["control"]["words"],
        words.registered_text(summary),
        words.verified_text(summary),
        words.legend(summary),
    ]
    return [text for text in texts if text]


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for label, model in summary["models"].items():
        found = [(column, column.find(model)) for column in COLUMNS]
        cells = {
            column.key: NOTHING if value is None else column.show(value) for column, value in found
        }
        if label == summary["champion"]:
            cells["verdict"] += ", champion"
        rows.append((label, list(cells.values())))
    return rows
