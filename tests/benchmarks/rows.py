"""The results of a benchmark: rows with a value, a unit and a goal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BUILD = Path(__file__).resolve().parents[2] / "build"
GIB = 2**30
EXACT = ("nats", "items", "choices")
"""Units of numbers that must agree; speed and memory may miss a goal."""

Row = dict[str, Any]
console = Console()


def row(
    what: str,
    unit: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Return one row; `holds` is null without a goal."""
    goal = holds = None
    if at_least is not None:
        goal, holds = f"≥ {at_least:g}", value >= at_least
    if at_most is not None:
        goal, holds = f"≤ {at_most:g}", value <= at_most
    return {"what": what, "value": value, "unit": unit, "goal": goal, "holds": holds}


def result_file(file: Path, *, quick: bool) -> Path:
    """Return where results go; those of a quick run do not replace the others."""
    return file.with_stem(f"{file.stem}_quick") if quick else file


def differing(found: list[Row]) -> list[str]:
    """Return the rows of numbers that must agree and do not."""
    return [one["what"] for one in found if one["unit"] in EXACT and one["holds"] is False]


def report(found: list[Row], title: str = "Speed and memory") -> None:
    """Print the rows and the missed goals."""
    table = Table("figure", "value", "unit", "goal", "verdict", title=title, title_justify="left")
    for one in found:
        verdict = {None: "", True: "[green]holds[/green]", False: "[red]missed[/red]"}[one["holds"]]
        table.add_row(one["what"], f"{one['value']:.4g}", one["unit"], one["goal"] or "", verdict)
    console.print(table)
    missed = [one["what"] for one in found if one["holds"] is False]
    console.print(
        f"goals missed: {'; '.join(missed)}" if missed else "all goals hold",
        style="red" if missed else "green",
    )
