"""`lora check`: prepare the data and print what would be learned, without loading a model."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.config.recipe import Recipe
from pipelines.data.data_warnings import data_warnings
from pipelines.models.base_model import identify
from pipelines.runtime.interfaces.results import DataResult, LengthHistogram, Preview, SourceFacts
from pipelines.runtime.launcher import ensure_result
from pipelines.runtime.sharding import check_launch
from pipelines.workflow.stages import PreparedData, Stages

BAR_WIDTH = 40
SUPERVISED_STYLE = "black on green"
PROMPT_STYLE = "dim"
console = Console()


def print_check(recipe: Recipe, stages: Stages) -> None:
    """Prepare the data, which a run reuses, and print them with warnings."""
    from pipelines.models.base_tokenizer import base_tokenizer

    check_launch(recipe)
    section = recipe.base_model
    identity = identify(section.id, section.revision, trust_remote_code=section.trust_remote_code)
    with base_tokenizer(identity) as base:
        data_stage = stages.data(base)
        data = PreparedData(data_stage, ensure_result(data_stage, threads=1))
        check = ensure_result(stages.check(base, data), threads=1)
    for source in data.result.sources:
        _print_source(source)
    console.print(_counts_table(data.result))
    console.print(_lengths_table(data.result.lengths))
    _print_previews(data.result.previews)
    warnings = data_warnings(data.result, check, recipe.data)
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    if not warnings:
        console.print("no warnings", style="green")


def _print_source(source: SourceFacts) -> None:
    file = [source.format, source.encoding, source.delimiter_name]
    format_text = ", ".join(text for text in file if text)
    line = Text(source.source, style="bold")
    line.append(f": {source.rows:,} rows ({format_text})", style="default")
    console.print(line)
    used = ", ".join(source.used_columns)
    unused = ", ".join(source.unused_columns) or "none"
    columns = f"  read as {source.schema_name}; columns used: {used}; not used: {unused}"
    console.print(Text(columns))


def _counts_table(result: DataResult) -> Table:
    table = Table("examples", "number", title="Examples", title_justify="left")
    counts = {
        "training": result.train_examples,
        "validation": result.validation_examples,
        "tuning": result.tuning_examples,
        "neither trained on nor scored": result.unused_examples,
        "excluded because of validation rows": result.excluded_examples,
        "truncated": result.cut,
        "left out": result.left_out,
        "rows removed": result.bad_rows,
        "training tokens": result.train_tokens,
        "supervised training tokens": result.supervised_tokens,
        "training examples whose end token is supervised": result.ends_supervised,
        "held-out examples that are training examples": result.overlap.exact,
        "held-out examples that are nearly training examples": result.overlap.near,
    }
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    return table


def _lengths_table(lengths: LengthHistogram) -> Table:
    title = (
        f"Lengths in tokens: median {lengths.median:,}, 95 % up to {lengths.percentile_95:,}, "
        f"99 % up to {lengths.percentile_99:,}, longest {lengths.longest:,}"
    )
    table = Table("up to", "examples", "", title=title, title_justify="left")
    most = max(lengths.counts, default=1)
    for upper, count in zip(lengths.upper, lengths.counts, strict=True):
        bar = "█" * round(BAR_WIDTH * count / most)
        table.add_row(f"{upper:,}", f"{count:,}", bar)
    return table


def _print_previews(previews: Sequence[Preview]) -> None:
    for number, preview in enumerate(previews, start=1):
        title = Text(f"Training example {number}: ", style="bold")
        title.append("supervised", style=SUPERVISED_STYLE)
        title.append(" and ")
        title.append("prompt", style=PROMPT_STYLE)
        console.print(title)
        console.print(_colored(preview))


def _colored(preview: Preview) -> Text:
    """Return the tokens, colored by supervision and separated by a thin bar."""
    text = Text()
    for token, is_supervised in zip(preview.tokens, preview.supervised, strict=True):
        style = SUPERVISED_STYLE if is_supervised else PROMPT_STYLE
        text.append(token.replace("\n", "⏎\n"), style=style)
        text.append("│", style="dim")
    if preview.more_tokens:
        text.append(f" … {preview.more_tokens:,} more tokens")
    return text
