"""A wall clock that jumps during a training is not taken for a stall or for elapsed time."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from faults.trial import EVERY, Outcome, Site

SOURCE = Path(__file__).with_name("clock.c")
YEAR = 366 * 24 * 3600
JUMPS = (YEAR, -YEAR)
"""Seconds by which the clock is off, one after the other."""


def objection() -> str | None:
    """Return why no clock can jump on this machine; None if one can."""
    return (
        None
        if sys.platform == "linux" and shutil.which("cc")
        else "a clock that jumps needs Linux and a C compiler"
    )


def jumping_clock(site: Site, random: Random) -> Outcome:
    """Let the wall clock of all ranks and of the run jump ahead and back by a year."""
    trial = site.training()
    library, clock = trial.runs / "clock.so", trial.runs / "clock"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    clock.write_text("0")
    trial.start(LD_PRELOAD=str(library), CLOCK_FILE=str(clock))
    at = trial.at_step(random.randrange(1, EVERY))
    years = {_year(trial.rows()[-1])}
    for jump in JUMPS:
        clock.write_text(str(jump))
        at = trial.at_step(at + 3 * EVERY)
        years.add(_year(trial.rows()[-1]))
    untroubled = trial.ended() == 0 and trial.starts() == [0]
    return Outcome(
        untroubled and len(years) == 3 and trial.is_identical(),
        0,
        0.0,
        f"(nothing: {sorted(years)} in one run)",
    )


def _year(row: dict[str, float]) -> int:
    return time.gmtime(row["time"]).tm_year
