"""Measure which metrics detect forgetting, and whether LoRA learns less and forgets less.

    python tests/truth/truth.py

Runs two recipes, or uses their cached runs: `frontier_smollm2_cpu`, adapters and a control whose
learning rate was chosen from a grid, and `pushed_smollm2_cpu`, a full fine-tuning at ten times a
good learning rate, which is known to forget. Scores the same items with lm-eval, and takes a
screenshot of the page. The results go to build/truth.json; a missed goal is an error.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frontier_rows import finding_rows, frontier_rows
from harness_rows import harness_rows
from page_rows import page_rows
from rich.console import Console
from rich.table import Table
from sight_rows import sight_rows

from lora_core.files import write_json
from pipelines.paths import runs_root

RESULT = Path(__file__).resolve().parents[2] / "build" / "truth.json"
FRONTIER, PUSHED = "frontier_smollm2_cpu", "pushed_smollm2_cpu"
Row = dict[str, Any]


def main() -> int:
    """Run, collect, write and print every result; return 1 if a goal is missed."""
    tuned, pushed = (finished(name) for name in (FRONTIER, PUSHED))
    sections: dict[str, Iterator[Row]] = {
        "What was run": (command_row(summary) for summary in (tuned, pushed)),
        "Which figure sees that a model forgot": sight_rows(tuned, pushed),
        "Learning against forgetting": frontier_rows(tuned),
        "LoRA learns less and forgets less (arXiv 2405.09673)": finding_rows(tuned),
        "The same items by lm-eval": harness_rows(tuned),
        "The page": page_rows(
            runs_root() / FRONTIER / "report.html", RESULT.with_name("report.png")
        ),
    }
    rows = []
    for title, section in sections.items():
        found = list(section)
        show(title, found)
        rows += found
    write_json(RESULT, rows)
    return 0 if all(row["holds"] is not False for row in rows) else 1


def finished(name: str) -> dict[str, Any]:
    """Return the summary of a recipe's run, after finishing the run if needed."""
    subprocess.run([str(Path(sys.executable).parent / "lora"), "run", name], check=True)
    summary: dict[str, Any] = json.loads((runs_root() / name / "summary.json").read_text())
    return summary


def command_row(summary: dict[str, Any]) -> Row:
    """Return the command of a run, with the total time of its stages, cached or not."""
    results = [
        Path(stage["folder"]) / "result.json" for stage in summary["stages"] if stage["folder"]
    ]
    reported = [json.loads(result.read_text())["result"] for result in results]
    seconds = sum(one["seconds"] or one["totals"]["training_seconds"] for one in reported)
    return {
        "what": f"lora run {summary['name']}",
        "value": round(seconds),
        "unit": "seconds of its stages",
        "goal": None,
        "holds": None,
    }


def show(title: str, rows: list[Row]) -> None:
    """Print one section."""
    table = Table("what", "value", "unit", "goal", "holds", title=title, title_justify="left")
    for row in rows:
        holds = {None: "", True: "yes", False: "NO"}[row["holds"]]
        value = (
            f"{row['value']:.4g}" if isinstance(row["value"], int | float) else str(row["value"])
        )
        table.add_row(row["what"], value, row["unit"], row["goal"] or "", holds)
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
