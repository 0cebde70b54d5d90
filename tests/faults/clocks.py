"""A clock that jumps under a training: what runs by the clock must not take that for a stall, or for time that has passed."""

import glob
import time
from random import Random

from faults.trial import EVERY, Outcome, Site

LIBRARIES = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")  # noqa: PTH207 - a pattern over architectures
JUMPS = ("+400d", "-400d")


def objection() -> str | None:
    """Say why no clock can jump here; None where one can."""
    return None if LIBRARIES else "a clock that jumps needs libfaketime"


def jumping_clock(site: Site, random: Random) -> Outcome:
    """Let the wall clock of all ranks and of the run jump forth by more than a year, and back behind where it was."""
    trial = site.training()
    clock = trial.runs / "clock"
    clock.write_text("+0")
    trial.begin(
        LD_PRELOAD=LIBRARIES[0],
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    at = trial.at_step(random.randrange(1, EVERY))
    years = set()
    for jump in JUMPS:
        clock.write_text(jump)
        at = trial.at_step(at + 3 * EVERY)
        years.add(time.gmtime(trial.rows()[-1]["time"]).tm_year)
    status, said = trial.ended(), trial.said().strip()
    untroubled = status == 0 and len(said.splitlines()) == 1 and trial.starts() == [0]
    return Outcome(untroubled and len(years) == len(JUMPS) and trial.is_whole(), 0, 0.0, f"(nothing: {sorted(years)} in one run)")
