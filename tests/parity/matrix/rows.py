"""The matrix of models and settings in PEFT and here, as rows of the result.

For each kind of model, how many cases and checks end how; then every failure, every refusal by its
reason, and what PEFT refuses. A refusal without a declared reason misses a goal, as a wrong result
and a crash do.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from parity.matrix.checks import CHECKS
from parity.matrix.configurations import Configuration
from parity.matrix.outcome import Ending, Outcome, ended
from parity.matrix.pairs import Pair, pairs_of
from parity.matrix.reasons import BOTH, reason_for
from parity.matrix.subjects import Subject
from parity.matrix.trial import Base, Trial, trial_of
from parity.rows import Row, at_most, figure, show_grid, show_list

FAILURES = (Ending.WRONG, Ending.CRASHED)
SHOWN = 160
"""Characters of a message in a row."""
LISTS = ("failure: ", "refusal: ", "PEFT: ")
"""How the rows start that are not counts of a kind of models."""


def matrix_rows() -> Iterator[Row]:
    """Yield the rows of all cases."""
    return rows_of(list(outcomes_of(pairs_of(quick=False))))


def quick_matrix_rows() -> Iterator[Row]:
    """Yield the rows of some cases, with every model and every configuration at least once."""
    return rows_of(list(outcomes_of(pairs_of(quick=True))))


def outcomes_of(pairs: Iterable[Pair]) -> Iterator[Outcome]:
    """Run every check of every case; each model is built once."""
    for subject, group in groupby(pairs, key=lambda pair: pair[0]):
        with TemporaryDirectory() as folder:
            torch.manual_seed(3)
            base = Base(subject.build().eval(), Path(folder))
            for number, (_, configuration) in enumerate(group):
                trial = trial_of(subject, configuration, base, Path(folder) / str(number))
                yield from examine(trial, subject, configuration)


def examine(trial: Trial, subject: Subject, configuration: Configuration) -> Iterator[Outcome]:
    """Yield the outcomes of all checks of one case."""
    case = f"{subject.name}, {configuration.name}"
    for name, check in CHECKS.items():
        ending, detail = ended(partial(check, trial))
        yield Outcome(case, subject.kind, name, ending, detail)


def rows_of(outcomes: list[Outcome]) -> Iterator[Row]:
    """Yield the counts of each kind and of all, then the lists."""
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        yield from _counts(kind, [outcome for outcome in outcomes if outcome.kind == kind])
    yield from _counts("all", outcomes)
    yield from _failures(outcomes)
    yield from _refusals(outcomes)
    yield from _of_peft(outcomes)


def show_matrix(title: str, rows: list[Row]) -> None:
    """Print the counts as a grid and the rest as a list."""
    show_grid(title, [row for row in rows if not row["what"].startswith(LISTS)])
    show_list("", [row for row in rows if row["what"].startswith(LISTS)])


def _counts(kind: str, outcomes: list[Outcome]) -> Iterator[Row]:
    yield figure(f"{kind}: cases", len({outcome.case for outcome in outcomes}))
    endings = Counter(outcome.ending for outcome in outcomes)
    for ending in Ending:
        what = f"{kind}: {ending.value}"
        number = endings[ending]
        yield at_most(what, number, 0) if ending in FAILURES else figure(what, number)


def _failures(outcomes: list[Outcome]) -> Iterator[Row]:
    """Yield each failure once per case, with the number of checks that show it."""
    checks: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.ending in FAILURES:
            key = (outcome.ending.value, outcome.case, outcome.detail[:SHOWN])
            checks[key].append(outcome.check)
    for (ending, case, detail), names in checks.items():
        what = f"failure: {ending}, {case}, {' and '.join(names[:2])}: {detail}"
        yield at_most(what, len(names), 0, "checks")


def _refusals(outcomes: list[Outcome]) -> Iterator[Row]:
    """Yield the number of cases for each declared reason, and each refusal without one."""
    refused_by_peft = {outcome.case for outcome in outcomes if _is_refused_by_peft(outcome)}
    cases: dict[str, set[str]] = defaultdict(set)
    undeclared: dict[str, set[str]] = defaultdict(set)
    for outcome in outcomes:
        if outcome.ending is not Ending.REFUSED:
            continue
        reason = reason_for(outcome.detail)
        if reason is None and outcome.case in refused_by_peft:
            reason = BOTH
        if reason is None:
            undeclared[outcome.detail[:SHOWN]].add(f"{outcome.case}: {outcome.check}")
        else:
            cases[reason].add(outcome.case)
    for reason, names in sorted(cases.items(), key=lambda item: -len(item[1])):
        yield figure(f"refusal: {reason}, such as {min(names)}", len(names), "cases")
    for detail, names in undeclared.items():
        what = f"refusal: no declared reason, such as {min(names)}: {detail}"
        yield at_most(what, len(names), 0, "checks")


def _is_refused_by_peft(outcome: Outcome) -> bool:
    """Return whether PEFT cannot make or load the adapter, so that there is no file of it."""
    is_file = outcome.check == "PEFT's file here"
    return is_file and outcome.ending is Ending.REFERENCE_REFUSED


def _of_peft(outcomes: list[Outcome]) -> Iterator[Row]:
    """Yield the number of cases that PEFT refuses or contradicts itself in, by its message."""
    cases: dict[str, set[str]] = defaultdict(set)
    for outcome in outcomes:
        if outcome.ending in (Ending.REFERENCE_DIFFERS, Ending.ANNOUNCED):
            cases[outcome.detail[:SHOWN]].add(outcome.case)
        elif outcome.ending is Ending.REFERENCE_REFUSED:
            cases["it refuses the case or its own file"].add(outcome.case)
    for detail, names in cases.items():
        yield figure(f"PEFT: {detail}, such as {min(names)}", len(names), "cases")
