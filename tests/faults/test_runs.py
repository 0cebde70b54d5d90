"""A whole run survives each fault: it says what happened, leaves nothing behind, and goes on to the same bits."""

import time
from random import Random

import pytest

from faults.every import RUNS, Fault
from faults.kills import ENDS
from faults.trial import EVERY, Site

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.mark.parametrize("fault", [fault for fault in RUNS if fault.elsewhere is None], ids=lambda fault: fault.name)
def test_a_run_survives(site: Site, random: Random, fault: Fault) -> None:
    if fault.objection is not None:
        pytest.skip(fault.objection)
    outcome = fault.inject(site, random)
    assert outcome.survived, outcome


def test_a_run_goes_on_after_each_way_to_end_it(site: Site, random: Random) -> None:
    """One after the other, so that it goes on from where the last one left it."""
    trial, done = site.run(), 0
    for attempt, end in enumerate(ENDS, start=1):
        trial.begin()
        done = trial.at_step(done + random.randrange(EVERY + 1, 3 * EVERY), attempt)
        end.strike(trial)
        since = time.monotonic()
        assert trial.ended() == end.status, trial.said()
        assert trial.nothing_left()
    outcome = trial.go_on(done=done, since=since, said="")
    assert outcome.survived, outcome
    assert trial.states() == [*(end.state for end in ENDS), "COMPLETED"]
