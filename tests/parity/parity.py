"""Hold a finished run and the library against the outside: PEFT, published figures, and what merging and cutting lose.

    python tests/parity/parity.py [RUN]

RUN is the name of a run. The figures go to build/parity.json; a goal that is missed is an error.
"""

import json
import sys
from pathlib import Path
from typing import Any

from budget_rows import published_rows
from merge_rows import merge_rows
from peft_rows import peft_rows
from rank_rows import rank_rows
from rich.console import Console
from rich.table import Table

from lora_core.files import write_json
from pipelines.places import runs_root

RESULT = Path(__file__).resolve().parents[2] / "build" / "parity.json"
Row = dict[str, Any]


def main() -> int:
    """Collect, write and print every figure; return 1 where a goal is missed."""
    name = sys.argv[1] if len(sys.argv) > 1 else "docstrings_smollm2_cpu"
    path = runs_root() / name / "summary.json"
    if not path.is_file():
        print(f"error: {path} is not there; `lora run {name}` first", file=sys.stderr)
        return 2
    summary = json.loads(path.read_text())
    sections = {
        "The adapters of the run in PEFT and here": list(peft_rows(summary)),
        "What a merge keeps": list(merge_rows(summary)),
        "One adapter cut to lower ranks": list(rank_rows(summary)),
        "The budget beside published figures": published_rows(),
    }
    rows = [row for section in sections.values() for row in section]
    write_json(RESULT, rows)
    for title, section in sections.items():
        show(title, section)
    return 0 if all(row["holds"] is not False for row in rows) else 1


def show(title: str, rows: list[Row]) -> None:
    """Print one section."""
    table = Table("what", "value", "unit", "goal", "holds", title=title, title_justify="left")
    for row in rows:
        holds = {None: "", True: "yes", False: "NO"}[row["holds"]]
        table.add_row(row["what"], f"{row['value']:.4g}", row["unit"], row["goal"] or "", holds)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
