"""A whole run survives each fault: it says what happened, leaves nothing behind, and goes on to the same bits."""

from random import Random

import pytest

from faults.every import RUNS, Fault
from faults.trial import Site

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.mark.parametrize("fault", [fault for fault in RUNS if fault.elsewhere is None], ids=lambda fault: fault.name)
def test_a_run_survives(site: Site, random: Random, fault: Fault) -> None:
    if fault.objection is not None:
        pytest.skip(fault.objection)
    outcome = fault.inject(site, random)
    assert outcome.survived, outcome
