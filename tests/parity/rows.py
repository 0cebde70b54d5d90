"""The rows of build/parity.json, {what, value, unit, goal, holds}, and how a section is printed.

`what` names the subject and, after the last colon, the metric; a grid has a line for each subject
and a column for each metric.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


class LeftOut(Exception):
    """A section that cannot be measured here, with the reason and the fix."""


def figure(what: str, value: float, unit: str = "") -> Row:
    """Return a row without a goal."""
    return {"what": what, "value": value, "unit": unit, "goal": None, "holds": None}


def at_most(what: str, value: float, goal: float, unit: str = "") -> Row:
    return {
        "what": what,
        "value": value,
        "unit": unit,
        "goal": f"<= {goal:g}",
        "holds": value <= goal,
    }


def at_least(what: str, value: float, goal: float, unit: str = "") -> Row:
    return {
        "what": what,
        "value": value,
        "unit": unit,
        "goal": f">= {goal:g}",
        "holds": value >= goal,
    }


def near(what: str, value: float, goal: float, tolerance: float, unit: str = "") -> Row:
    """Return a row whose goal is a published value, with a relative tolerance."""
    holds = abs(value - goal) <= tolerance * goal
    return {
        "what": what,
        "value": value,
        "unit": unit,
        "goal": f"{goal:g} within {tolerance:.1%}",
        "holds": holds,
    }


def show_list(title: str, rows: list[Row]) -> None:
    """Print a line for each row."""
    table = Table("what", "value", "unit", "goal", "holds", title=title, title_justify="left")
    for row in rows:
        holds = {None: "", True: "yes", False: "NO"}[row["holds"]]
        table.add_row(row["what"], f"{row['value']:.4g}", row["unit"], row["goal"] or "", holds)
    Console(width=120).print(table)


def show_grid(title: str, rows: list[Row]) -> None:
    """Print a line for each subject; a value that misses its goal is followed by the goal."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        thing, _, name = row["what"].rpartition(": ")
        missed = f" NOT {row['goal']}" if row["holds"] is False else ""
        value = row["value"]
        cells.setdefault(thing, {})[name] = (
            f"{value:.2g}" if isinstance(value, float) else f"{value:,}"
        ) + missed
    names = list(dict.fromkeys(name for line in cells.values() for name in line))
    table = Table("", title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for thing, line in cells.items():
        table.add_row(thing, *(line.get(name, "–") for name in names))
    Console(width=120).print(table)


def has_rank(model: Row) -> bool:
    """Return whether a model of a summary is an adapter."""
    return model["training"] is not None and model["training"]["rank"] is not None
