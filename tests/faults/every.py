"""Every fault that is injected, by name, and how often `make faults` injects it."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from faults import clocks, kills, orchestrated, servers, storage, within
from faults.trial import Outcome, Site


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    inject: Callable[[Site, Random], Outcome]
    times: int = 1
    objection: str | None = None
    """Why it cannot be injected on this machine."""
    elsewhere: str | None = None
    """The test of the suite that covers it, if it is not the test of all such faults."""


TRAININGS = (
    Fault("kill -9 of a rank", kills.rank, 7),
    Fault("kill -9 of the launcher", kills.launcher, 5, elsewhere="test_resume"),
    Fault("a rank that hangs", kills.hanging_rank, elsewhere="test_heartbeats"),
    Fault("a second run at the same time", kills.second_run),
    Fault("a checkpoint with a flipped bit", storage.flipped_bit, 2, elsewhere="test_resuming"),
    Fault("a checkpoint cut short", storage.cut_short, 2, elsewhere="test_resuming"),
    Fault("a full disk while writing", storage.full_disk, objection=storage.small_disk_objection()),
    Fault("NaN in the loss of one rank", within.nan_on_one_rank, 2),
    Fault("a row that cannot be read", within.unreadable_row),
    Fault("a clock that jumps", clocks.jumping_clock, objection=clocks.objection()),
)
"""Faults of one training."""
RUNS = (
    Fault("kill -9 of the flow process", kills.KILLED.inject, 5, elsewhere="test_runs"),
    Fault("Ctrl-C", kills.INTERRUPTED.inject, 2, elsewhere="test_runs"),
    Fault("SIGTERM to every process of a run", kills.ALL_ENDED.inject, elsewhere="test_runs"),
    Fault("a step that exceeds memory", within.no_memory, elsewhere="test_runs"),
    Fault(
        "the tracking server gone for a minute",
        servers.away_for_a_minute,
        elsewhere="test_retry, test_live",
    ),
    Fault("the tracking server gone for good", servers.gone_for_good, elsewhere="test_run"),
)
"""Faults of a complete run."""
ORCHESTRATED = (
    Fault("kill -9 of the worker", orchestrated.killed_worker, 3, elsewhere="test_deploy"),
    Fault("a cancellation in Prefect", orchestrated.cancelled, 2, elsewhere="test_deploy"),
)
"""Faults of a run that a worker started."""
