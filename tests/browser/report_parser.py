"""Reads the report's HTML without a browser: the metrics in its attributes, its tags and links."""

from html.parser import HTMLParser
from pathlib import Path

from summaries import Summary, parsed

from pipelines.reporting.report import write_html

Cell = dict[str, str | None]
LINKS = ("src", "href", "xlink:href", "data", "action")
"""Attributes that may load something."""


class ReportParser(HTMLParser):
    """Collects the attributes of every cell of a model, and everything that could load a file."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: dict[tuple[str, str], Cell] = {}
        self.points: dict[tuple[str, str], Cell] = {}
        self.rules: dict[tuple[str, str], str] = {}
        self.tags: set[str] = set()
        self.identifiers: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if "id" in values:
            self.identifiers.append(values["id"] or "")
        for name in LINKS:
            if name in values:
                self.links.append(values[name] or "")
        model = values.get("data-model") or ""
        point = values.get("data-point") or ""
        if "data-rule" in values:
            self.rules[model, values["data-rule"] or ""] = values["data-value"] or ""
        if "data-figure" in values:
            cells = self.points if point else self.cells
            cells[point or model, values["data-figure"] or ""] = values


def render(summary: Summary, path: Path) -> tuple[str, ReportParser]:
    """Write the page of a summary, given as plain values; return its text and what was parsed."""
    write_html(parsed(summary), path)
    text = path.read_text(encoding="utf-8")
    parser = ReportParser()
    parser.feed(text)
    return text, parser


def interval_of(cell: Cell) -> dict[str, float]:
    """Return the interval in a cell's attributes."""
    names = {"mean": "data-value", "low": "data-low", "high": "data-high"}
    return {end: float(cell[name] or "") for end, name in names.items()}


def value_of(cell: Cell, name: str = "value") -> float:
    return float(cell[f"data-{name}"] or "")
