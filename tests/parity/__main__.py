"""Compare the library and a finished run with PEFT, other programs and published values.

    PYTHONPATH=tests python -m parity [RUN] [--quick]

RUN is the name of a run; without a finished run, or with --quick, the sections that need one are
omitted, and --quick tries only a part of the matrix of models and configurations. The results are
written to build/parity.json. Returns 0 if every goal is met, 1 if one is missed, 2 if the sections
of a run are omitted although they were requested.
"""

import argparse
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
from parity.fingerprint_rows import fingerprint_rows, quick_fingerprint_rows
from parity.llama_cpp_rows import llama_cpp_rows
from parity.matrix.rows import matrix_rows, quick_matrix_rows, show_matrix
from parity.merge_rows import merge_rows
from parity.peft_rows import peft_rows
from parity.rank_rows import rank_rows
from parity.rows import LeftOut, Row, show_grid, show_list

from lora_core.files import write_json
from pipelines.models.tokenizer import quiet
from pipelines.paths import runs_root

RESULT = Path(__file__).resolve().parents[2] / "build" / "parity.json"
THREADS = torch.get_num_threads()
DIFFERENCE = "largest difference, as a fraction of the largest logit or gradient"


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    rows: Callable[..., Iterable[Row]]
    quick: Callable[[], Iterable[Row]] | None = None
    """A part of the rows, for --quick."""
    of_a_run: bool = False
    """Whether the rows are computed from the summary of a run."""
    show: Callable[[str, list[Row]], None] = show_list


SECTIONS = (
    Section(f"Features in PEFT and here: {DIFFERENCE}", feature_rows, show=show_grid),
    Section(
        "Models and configurations in PEFT and here: how the checks end",
        matrix_rows,
        quick=quick_matrix_rows,
        show=show_matrix,
    ),
    Section("LoRA+ in PEFT and here", optimizer_rows),
    Section(
        "Fingerprints of folders and of the models loaded from them",
        fingerprint_rows,
        quick=quick_fingerprint_rows,
    ),
    Section(
        "Damaged adapters; with the sidecar none may load silently",
        damage_rows,
        show=show_grid,
    ),
    Section("Exports, read by other programs", export_rows),
    Section("The budget compared with published values", published_rows),
    Section("The adapters of the run in PEFT and here", peft_rows, of_a_run=True),
    Section("The adapters of the run in llama.cpp and here", llama_cpp_rows, of_a_run=True),
    Section("Fraction of the update that a merge keeps", merge_rows, of_a_run=True),
    Section("One adapter truncated to lower ranks", rank_rows, of_a_run=True),
)


def main() -> int:
    """Collect, print and write all results; return the exit code described above."""
    quiet()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="?", default="docstrings_smollm2_cpu")
    parser.add_argument(
        "--quick", action="store_true", help="omit the sections of a run, and most of the matrix"
    )
    options = parser.parse_args()
    path = runs_root() / options.run / "summary.json"
    summary = None
    if path.is_file() and not options.quick:
        summary = json.loads(path.read_text())
    sections = [section for section in SECTIONS if summary is not None or not section.of_a_run]
    quick = options.quick
    rows = [row for section in sections for row in measured(section, summary, quick=quick)]
    result = RESULT.with_stem("parity_quick") if quick else RESULT
    write_json(result, rows)
    missed = [row["what"] for row in rows if row["holds"] is False]
    print(f"{len(rows)} results in {result}; goals missed: {', '.join(missed) or 'none'}")
    if summary is None and not quick:
        omitted = ", ".join(section.title for section in SECTIONS if section.of_a_run)
        print(f"omitted, because {path} does not exist (`make run` creates it): {omitted}")
    if missed:
        return 1
    return 2 if summary is None and not quick else 0


def measured(section: Section, summary: Row | None, *, quick: bool) -> list[Row]:
    """Measure one section and print it."""
    started = time.monotonic()
    if not section.of_a_run:
        torch.set_num_threads(1)  # with tiny models, threads wait for each other
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tests check PEFT's warnings
            rows = list(_rows(section, summary, quick=quick))
    except LeftOut as reason:
        print(f"{section.title}: omitted; {reason}\n")
        return []
    finally:
        torch.set_num_threads(THREADS)
    section.show(f"{section.title} ({time.monotonic() - started:.0f} s)", rows)
    return rows


def _rows(section: Section, summary: Row | None, *, quick: bool) -> Iterable[Row]:
    if section.of_a_run:
        return section.rows(summary)
    if quick and section.quick is not None:
        return section.quick()
    return section.rows()


if __name__ == "__main__":
    sys.exit(main())
