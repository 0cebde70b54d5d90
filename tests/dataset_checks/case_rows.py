"""All cases as rows of results."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from parity.rows import Row, at_least

from dataset_checks import (
    file_cases,
    message_cases,
    refused_files,
    refused_rows,
    schema_cases,
    template_cases,
    tool_cases,
)
from dataset_checks.bases import base
from dataset_checks.expectations import FileCase, Refused, RowCase
from dataset_checks.observed import RowOutcome, run_row_case
from dataset_checks.prepared_files import run_file_case
from dataset_checks.shipped_templates import rows_for, shipped_templates, template_difference
from dataset_checks.trl_tokens import our_splits, trl_splits

ROW_CASES: tuple[RowCase, ...] = (
    *schema_cases.CASES,
    *message_cases.CASES,
    *tool_cases.CASES,
    *template_cases.CASES,
    *refused_rows.CASES,
)
FILE_CASES: tuple[FileCase, ...] = (*file_cases.CASES, *refused_files.CASES)


@dataclass(frozen=True)
class CaseResult:
    """A case and how its outcome differs."""

    name: str
    problem: str
    """Empty if it is as expected, or if only the tokens of TRL are expected."""
    trl_problem: str | None = None
    """How the tokens differ from those of TRL; None if they are not compared."""


def row_case_results() -> list[CaseResult]:
    """Run all cases of rows in memory."""
    results = []
    for case in ROW_CASES:
        outcome = run_row_case(case)
        results.append(CaseResult(case.name, outcome.problem, _trl_problem(case, outcome)))
    return results


def file_case_results() -> list[CaseResult]:
    """Prepare the files of all cases."""
    with TemporaryDirectory() as folder:
        base("chatml").save_pretrained(folder)
        return [CaseResult(case.name, run_file_case(case, Path(folder))) for case in FILE_CASES]


def shipped_template_results() -> list[CaseResult]:
    """Compare the tokens of real families' templates with TRL's."""
    results = []
    for file in shipped_templates():
        for name, row in rows_for(file).items():
            problem = template_difference(file, row)
            results.append(CaseResult(f"{file.name}: {name}", "", problem))
    return results


def result_rows(results: list[CaseResult]) -> list[Row]:
    """Return a row for each comparison."""
    rows = []
    for result in results:
        rows.append(at_least(f"{result.name}: as expected", int(not result.problem), 1))
        if result.trl_problem is not None:
            rows.append(at_least(f"{result.name}: as TRL", int(not result.trl_problem), 1))
    return rows


def _trl_problem(case: RowCase, outcome: RowOutcome) -> str | None:
    """Return how the tokens differ from those of TRL; None if TRL is not a reference."""
    if isinstance(case.expected, Refused) or case.settings or case.differs_from_trl:
        return None
    if len(case.rows) > 1 or case.notes:
        return None
    tokenizer = base(case.base)
    theirs = trl_splits(case.rows[0], tokenizer)
    if theirs is None:
        return None
    ours = our_splits(outcome.examples, tokenizer)
    if ours == theirs:
        return ""
    shown = [[tokenizer.decode(list(ids)) for ids in split] for split in (*ours, *theirs)]
    return f"ours and TRL's: {shown!r}"
