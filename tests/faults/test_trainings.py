"""A training reports each fault, leaves no process behind, and resumes bit for bit."""

from random import Random

import pytest

from faults.every import TRAININGS, Fault
from faults.trial import Site

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "fault", [fault for fault in TRAININGS if fault.elsewhere is None], ids=lambda fault: fault.name
)
def test_a_training_survives(site: Site, random: Random, fault: Fault) -> None:
    if fault.objection is not None:
        pytest.skip(fault.objection)
    outcome = fault.inject(site, random)
    assert outcome.survived, outcome
