"""The report of a comparison: a table for the terminal, one for a workflow's page, and a page of HTML to hand on.

All three read the plain values of summary.json and show the same columns, which are declared here once. The page needs
nothing beside itself: its plots are inline SVG, its style is in the file, and whatever a model wrote is escaped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from lora_core.files import write_text
from pipelines.judging.comparison import BASE, CONTROL, QUANTIZED_BASE
from pipelines.reporting.plots import plot_by_rank, plot_trade_off

SAMPLES = 4
NOTHING = "–"
COLOURS = {"pass": "green", "reject": "red", "can't tell": "yellow"}
Model = Mapping[str, Any]


def signed(value: float) -> str:
    """Return a difference with its sign; what rounds to zero has none."""
    text = f"{value:+.3f}"
    return text.replace("-", "−") if float(text) else text[1:]


def ends(interval: Mapping[str, float]) -> str:
    """Return the two ends of an interval."""
    return f"{signed(interval['low'])}, {signed(interval['high'])}"


def interval_text(interval: Mapping[str, float]) -> str:
    """Return a mean with the ends of its interval."""
    return f"{signed(interval['mean'])} ({ends(interval)})"


def scaled(value: float, units: Sequence[str]) -> str:
    """Return three digits and the unit that makes them so, with a space that does not break: 19.7 MB."""
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    digits = f"{value:.0f}" if place == 0 else f"{value:#.3g}".rstrip(".")
    return f"{digits}\u00a0{units[place]}".rstrip()


def duration(seconds: float) -> str:
    """Return seconds as minutes and seconds: 12 min 40 s."""
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else f"{whole // 60} min {whole % 60:02d} s"


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


def _against_base(model: Model) -> Any:
    """Return the comparison with the full-precision base; the base in 4 bits has no other."""
    return model.get("total", model.get("change", {}))


short_count = partial(scaled, units=("", "k", "M", "G", "T"))
short_size = partial(scaled, units=("B", "kB", "MB", "GB", "TB"))
COLUMNS = (
    Column("trained_weights", "Trained weights", _trained("trained_weights"), short_count),
    Column("file_bytes", "File", _trained("file_bytes"), short_size),
    Column("task_loss", "Task loss", lambda model: model["scores"]["task_loss"], "{:.3f}".format),
    Column("task_gain", "Task gain", lambda model: _against_base(model).get("task_gain"), lambda gain: signed(gain["mean"])),
    Column("general_change", "General change", lambda model: model.get("change", {}).get("choice_probability"), interval_text),
    Column("verdict", "Verdict", lambda model: model.get("verdict", {}).get("status"), str),
    Column("tokens_per_second", "Tokens/s", _trained("tokens_per_second"), short_count),
    Column("peak_memory_bytes", "Peak memory", _trained("peak_memory_bytes"), short_size),
)


def terminal_table(summary: dict[str, Any]) -> Table:
    """Return one row per model of summary.json, for a terminal of 100 columns or more."""
    caption = f"{summary['decision']}\n{_legend(summary)}"
    table = Table(title=summary["name"], caption=Text(caption), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_style, table.caption_justify = "bold", "left"
    table.add_column("Model", no_wrap=True)
    for column in COLUMNS:
        is_text = column.key == "verdict"
        table.add_column(
            column.title.replace(" ", "\n"), justify="left" if is_text else "right", no_wrap=not is_text, min_width=10 if is_text else None
        )
    for label, cells in _rows(summary):
        style = "dim" if label in (BASE, QUANTIZED_BASE) else "bold" if label == summary["champion"] else ""
        texts = [Text(text, style=COLOURS.get(text.partition(",")[0], "")) for text in cells]
        table.add_row(label, *texts, style=style)
    return table


def markdown_table(summary: dict[str, Any]) -> str:
    """Return the same table as GitHub Markdown, with the decision above and below it what was registered, if anything was."""
    lines = [
        f"**{headline(summary)}**",
        "",
        f"Decision: {summary['decision']}",
        "",
        "| " + " | ".join(["Model", *(column.title for column in COLUMNS)]) + " |",
        "| " + " | ".join(["---", *("---" if column.key == "verdict" else "---:" for column in COLUMNS)]) + " |",
        *("| " + " | ".join([label, *cells]) + " |" for label, cells in _rows(summary)),
        "",
        _legend(summary),
    ]
    registered = registered_text(summary)
    return "\n".join([*lines, "", registered] if registered else lines) + "\n"


def write_html(summary: dict[str, Any], path: Path) -> None:
    """Write the whole comparison as one page that needs no other file.

    Args:
        summary: the plain values of summary.json; the item files that it names are read for sample answers.
        path: the .html file; replaced when complete.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"signed": signed, "ends": ends, "count": short_count, "duration": duration}
    page = environment.get_template("report.html.jinja").render(
        summary=summary,
        headline=headline(summary),
        registered=registered_text(summary),
        columns=COLUMNS,
        effects=_effects(summary["models"]),
        samples=_samples(summary),
        plot_by_rank=plot_by_rank(summary),
        plot_trade_off=plot_trade_off(summary),
    )
    write_text(path, page)


def headline(summary: Mapping[str, Any]) -> str:
    """Return the outcome as one sentence for a reader who knows no ranks."""
    champion, candidate = summary["champion"], summary["candidate"]
    if champion is None:
        return "No adapter is put forward" + (f"; {candidate} was not rejected, and scoring more items would tell." if candidate else ".")
    model = summary["models"][champion]
    learnt, trained = 100 * model["gain_share"]["mean"], 100 * model["figures"]["trained_weights"] / summary["base"]["weights"]
    return (
        f"Use {champion}: by training {trained:.2g}\u00a0% as many weights it learnt {learnt:.0f}\u00a0% of what full fine-tuning learnt, "
        "and it forgot no more than the gate allows."
    )


def registered_text(summary: Mapping[str, Any]) -> str:
    """Return which versions and aliases the registry holds; nothing where none was registered."""
    registered = summary.get("registered")
    if not registered:
        return ""
    versions = ", ".join(f"{label} as version {version}" for label, version in registered["versions"].items())
    aliases = ", ".join(f"{alias} is version {version}" for alias, version in registered["aliases"].items())
    return f"Registered in {registered['model']}: {versions}" + (f"; {aliases}." if aliases else "; no alias was moved.")


def _legend(summary: Mapping[str, Any]) -> str:
    of_base = f"; of {QUANTIZED_BASE}: by quantisation" if QUANTIZED_BASE in summary["models"] else ""
    return f"Task gain: nats per token over the base. General change: by training, with its 95 % interval{of_base}."


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for label, model in summary["models"].items():
        found = [(column, column.find(model)) for column in COLUMNS]
        cells = {column.key: NOTHING if value is None else column.show(value) for column, value in found}
        if label == summary["champion"]:
            cells["verdict"] += ", champion"
        rows.append((label, list(cells.values())))
    return rows


def _effects(models: Mapping[str, Model]) -> dict[str, dict[str, Any]]:
    """Return, for each model but the base, the comparisons that tell quantisation, training and both apart."""
    by_quantisation = models.get(QUANTIZED_BASE, {}).get("change")
    return {
        label: {
            "quantisation": None if label == CONTROL else by_quantisation,
            "training": None if label == QUANTIZED_BASE else model["change"],
            "total": _against_base(model),
        }
        for label, model in models.items()
        if label != BASE
    }


def _samples(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return, for the first prompts that every model answered, each model's record."""
    labels = [label for label in summary["models"] if label != QUANTIZED_BASE and label in summary["items"]]
    generated = {label: _generations(Path(summary["items"][label])) for label in labels}
    shared = sorted(set.intersection(*(set(records) for records in generated.values()))) if generated else []
    return [{label: records[place] for label, records in generated.items()} for place in shared[:SAMPLES]]


def _generations(path: Path) -> dict[int, dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:  # not splitlines, which also breaks at separators inside an answer
        return {record["id"]: record for record in map(json.loads, lines) if record["kind"] == "generation"}
