"""A run reports each fault, leaves no process behind, and resumes to a bit-identical result."""

import time
from random import Random

import pytest

from faults.kills import ENDS
from faults.trial import EVERY, Site
from faults.within import exceed_memory

pytestmark = [pytest.mark.slow, pytest.mark.server]


def test_a_run_resumes_after_each_fault(site: Site, random: Random) -> None:
    trial, done = site.run(), random.randrange(EVERY + 1, 3 * EVERY)
    clear, _ = exceed_memory(trial, done + 1, random.randrange(2))
    assert clear and trial.nothing_left(), trial.output()
    for attempt, end in enumerate(ENDS, start=2):
        trial.start()
        done = trial.at_step(done + random.randrange(EVERY + 1, 3 * EVERY), attempt)
        end.strike(trial)
        since = time.monotonic()
        assert trial.ended() == end.status, trial.output()
        assert trial.nothing_left()
    outcome = trial.resume(done=done, since=since, message="")
    assert outcome.survived, outcome
    assert trial.states() == ["FAILED", *(end.state for end in ENDS), "COMPLETED"]
