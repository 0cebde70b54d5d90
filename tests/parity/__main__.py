"""Hold the library, and a finished run, against the outside: PEFT, other programs, published figures, and what is lost.

    PYTHONPATH=tests python -m parity [RUN]

RUN is the name of a run; without one that is finished, the sections of a run are left out. The figures go to
build/parity.json. Returns 0 where every goal is met, 1 where one is missed, 2 where the sections of a run are left out.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from parity.budget_rows import published_rows
from parity.damage_rows import damage_rows
from parity.export_rows import export_rows
from parity.feature_rows import feature_rows, optimizer_rows
from parity.llama_cpp_rows import llama_cpp_rows
from parity.merge_rows import merge_rows
from parity.peft_rows import peft_rows
from parity.rank_rows import rank_rows
from parity.rows import LeftOut, Row, show_grid, show_list

from lora_core.files import write_json
from pipelines.models.tokenizer import quiet
from pipelines.paths import runs_root

RESULT = Path(__file__).resolve().parents[2] / "build" / "parity.json"
THREADS = torch.get_num_threads()
DIFFERENCE = "largest difference, as a part of the largest logit or gradient"


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    rows: Callable[..., Iterable[Row]]
    of_a_run: bool = False
    """Whether the rows are made from the summary of a run."""
    show: Callable[[str, list[Row]], None] = show_list


SECTIONS = (
    Section(f"Features in PEFT and here: {DIFFERENCE}", feature_rows, show=show_grid),
    Section("LoRA+ in PEFT and here", optimizer_rows),
    Section(
        "Damaged adapters; beside the sidecar none may be loaded silently",
        damage_rows,
        show=show_grid,
    ),
    Section("Exports, read by others", export_rows),
    Section("The budget beside published figures", published_rows),
    Section("The adapters of the run in PEFT and here", peft_rows, of_a_run=True),
    Section("The adapters of the run in llama.cpp and here", llama_cpp_rows, of_a_run=True),
    Section("What a merge keeps", merge_rows, of_a_run=True),
    Section("One adapter cut to lower ranks", rank_rows, of_a_run=True),
)


def main() -> int:
    """Collect, print and write every figure; see above for what is returned."""
    quiet()
    name = sys.argv[1] if len(sys.argv) > 1 else "docstrings_smollm2_cpu"
    path = runs_root() / name / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else None
    sections = [section for section in SECTIONS if summary is not None or not section.of_a_run]
    rows = [row for section in sections for row in measured(section, summary)]
    write_json(RESULT, rows)
    missed = [row["what"] for row in rows if row["holds"] is False]
    print(f"{len(rows)} figures in {RESULT}; goals missed: {', '.join(missed) or 'none'}")
    if summary is None:
        print(
            f"left out, since {path} is not there, which `make run` makes: {', '.join(s.title for s in SECTIONS if s.of_a_run)}"
        )
    return 1 if missed else 2 if summary is None else 0


def measured(section: Section, summary: Row | None) -> list[Row]:
    """Measure one section and print it."""
    started = time.monotonic()
    if not section.of_a_run:
        torch.set_num_threads(1)  # of tiny models the threads would wait for each other
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is looked at by the tests
            rows = list(section.rows(summary) if section.of_a_run else section.rows())
    except LeftOut as reason:
        print(f"{section.title}: left out; {reason}\n")
        return []
    finally:
        torch.set_num_threads(THREADS)
    section.show(f"{section.title} ({time.monotonic() - started:.0f} s)", rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
