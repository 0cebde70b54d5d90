"""A whole run says what happened, leaves nothing behind, and goes on to the same bits after each fault, one after the other."""

import time
from random import Random

import pytest

from faults.kills import ENDS
from faults.trial import EVERY, Site
from faults.within import exceed_memory

pytestmark = [pytest.mark.slow, pytest.mark.server]


def test_a_run_goes_on_after_each_fault(site: Site, random: Random) -> None:
    trial, done = site.run(), random.randrange(EVERY + 1, 3 * EVERY)
    clear, _ = exceed_memory(trial, done + 1, random.randrange(2))
    assert clear and trial.nothing_left(), trial.said()
    for attempt, end in enumerate(ENDS, start=2):
        trial.begin()
        done = trial.at_step(done + random.randrange(EVERY + 1, 3 * EVERY), attempt)
        end.strike(trial)
        since = time.monotonic()
        assert trial.ended() == end.status, trial.said()
        assert trial.nothing_left()
    outcome = trial.go_on(done=done, since=since, said="")
    assert outcome.survived, outcome
    assert trial.states() == ["FAILED", *(end.state for end in ENDS), "COMPLETED"]
