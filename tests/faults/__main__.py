"""Inject every fault several times; count survived runs, lost steps and seconds to recover.

    PYTHONPATH=tests python -m faults [SEED] [--quick]

Results are written to build/faults.json; a run that does not survive is an error.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from faults.every import ORCHESTRATED, RUNS, TRAININGS, Fault
from faults.trial import EVERY, Outcome, Site
from lora_core.files import write_json
from pipelines.runtime.launcher import REPOSITORY

RESULT = REPOSITORY / "build" / "faults.json"
KILLS = 20
"""Minimum number of processes to kill at random steps."""
MOST_LOST = 3 * EVERY
"""Steps since the newest checkpoint, which may be damaged, or an unfinished one."""
Row = dict[str, Any]


def main() -> int:
    """Inject, write and print everything; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument("--quick", action="store_true", help="kill one rank of one training, once")
    options = parser.parse_args()
    seed = options.seed
    random, console = Random(seed), Console(width=150)
    every = (*TRAININGS, *RUNS, *ORCHESTRATED)
    faults = (replace(TRAININGS[0], times=1),) if options.quick else every
    wanted_kills = 1 if options.quick else KILLS
    result = RESULT.with_stem("faults_quick") if options.quick else RESULT
    rows: list[Row] = []
    table = Table(
        "fault",
        "times",
        "survived",
        "steps lost",
        "seconds to recover",
        "last message",
    )
    table.title = f"Faults, at the random steps of seed {seed}"
    with TemporaryDirectory() as folder, Site.prepared(Path(folder)) as site:
        for fault in faults:
            if fault.objection is not None:
                table.add_row(fault.name, "0", "", "", "", fault.objection)
                rows.append(row(f"{fault.name}: {fault.objection}", 0, "times"))
                continue
            outcomes = [attempted(fault, site, random, console) for _ in range(fault.times)]
            rows += results(fault, outcomes)
            table.add_row(*words(fault, outcomes))
            write_json(result, rows)
    kills = sum(
        one["value"]
        for one in rows
        if one["what"].startswith("kill -9") and one["what"].endswith(": injected")
    )
    goal = f">= {wanted_kills}"
    rows.append(
        row("processes killed with kill -9", kills, "times", goal, holds=kills >= wanted_kills)
    )
    console.print(table)
    write_json(result, rows)
    return 0 if all(one["holds"] is not False for one in rows) else 1


def attempted(fault: Fault, site: Site, random: Random, console: Console) -> Outcome:
    """Inject a fault once; if the trial itself fails, the run did not survive."""
    try:
        outcome = fault.inject(site, random)
    except Exception as error:  # noqa: BLE001 - the other faults are still injected
        outcome = Outcome(False, 0, 0.0, f"{type(error).__name__}: {error}")
    verdict = "survived" if outcome.survived else "LOST"
    line = f"{fault.name}: {verdict}, {outcome.lost} steps, {outcome.seconds:.1f} s"
    console.print(line, highlight=False)
    if not outcome.survived:
        console.print(f"  {outcome.message}", highlight=False)
    return outcome


def results(fault: Fault, outcomes: list[Outcome]) -> Iterator[Row]:
    """Yield a fault's results."""
    survived, lost = sum(one.survived for one in outcomes), max(one.lost for one in outcomes)
    yield row(f"{fault.name}: injected", len(outcomes), "times")
    yield row(
        f"{fault.name}: survived",
        survived,
        "times",
        f"= {len(outcomes)}",
        holds=survived == len(outcomes),
    )
    yield row(
        f"{fault.name}: steps lost, at most",
        lost,
        "steps",
        f"<= {MOST_LOST}",
        holds=lost <= MOST_LOST,
    )
    yield row(
        f"{fault.name}: seconds to recover, at most", max(one.seconds for one in outcomes), "s"
    )


def words(fault: Fault, outcomes: list[Outcome]) -> list[str]:
    """Return a fault's row of the table."""
    lost, seconds = [one.lost for one in outcomes], [one.seconds for one in outcomes]
    counted = [str(len(outcomes)), str(sum(one.survived for one in outcomes))]
    spread = [
        f"{mean(lost):.1f}, at most {max(lost)}",
        f"{mean(seconds):.1f}, at most {max(seconds):.1f}",
    ]
    return [fault.name, *counted, *spread, outcomes[-1].message[:160]]


def row(
    what: str, value: float, unit: str, goal: str | None = None, *, holds: bool | None = None
) -> Row:
    """Return one result."""
    return {"what": what, "value": value, "unit": unit, "goal": goal, "holds": holds}


if __name__ == "__main__":
    sys.exit(main())
