"""Prepare small data sets of every kind, and time the preparation of large ones.

    PYTHONPATH=tests python -m dataset_checks [--quick]

Each case states the tokens that must be learned, or the words of the refusal; where TRL reads the
same row, its tokens are a second reference. `--quick` times 2,000 conversations, without a goal.
The results go to build/data.json. Returns 1 if a goal is missed.
"""

import argparse
import sys
from pathlib import Path

from datasets import disable_progress_bars
from parity.rows import Row, at_most, show_grid, show_list
from rich.console import Console
from transformers.utils import logging

from dataset_checks.case_rows import (
    CaseResult,
    file_case_results,
    result_rows,
    row_case_results,
    shipped_template_results,
)
from dataset_checks.preparation_speed import ALL_ROWS, QUICK_ROWS, speed_rows
from dataset_checks.tool_speed import tool_speed_rows
from lora_core.files import write_json

RESULT = Path(__file__).resolve().parents[2] / "build" / "data.json"


def main() -> int:
    """Run all cases, time preparation, print and write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="time 2,000 rows only")
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows to time")
    parser.add_argument("--result", type=Path, default=RESULT, help="where the results go")
    options = parser.parse_args()
    disable_progress_bars()
    logging.set_verbosity_error()
    results = [*row_case_results(), *file_case_results(), *shipped_template_results()]
    wrong = _summary(results)
    sizes = options.rows
    if sizes is None:
        sizes = QUICK_ROWS if options.quick else ALL_ROWS
    speed = speed_rows(sizes, is_quick=options.quick)
    with_tools = tool_speed_rows()
    rows = [*result_rows(results), *wrong, *speed, *with_tools]
    write_json(options.result, rows)
    show_list("Cases", wrong)
    _show_problems(results)
    show_grid("Preparation", speed)
    show_list("Conversations with tools", with_tools)
    missed = [row["what"] for row in rows if row["holds"] is False]
    print(f"{len(results)} cases; goals missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def _summary(results: list[CaseResult]) -> list[Row]:
    wrong = sum(bool(result.problem) for result in results)
    compared = [result for result in results if result.trl_problem is not None]
    different = sum(bool(result.trl_problem) for result in compared)
    return [
        at_most(f"wrong cases of {len(results)}", wrong, 0),
        at_most(f"different from TRL of {len(compared)}", different, 0),
    ]


def _show_problems(results: list[CaseResult]) -> None:
    console = Console(width=150)
    for result in results:
        for problem in (result.problem, result.trl_problem):
            if problem:
                console.print(f"{result.name}: {problem}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
