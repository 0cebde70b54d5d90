"""Processes that are killed with SIGKILL at a random step, or receive SIGTERM."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from psutil import Process

from faults.trial import EVERY, STEPS, Outcome, Site, Trial, last_line


def rank(site: Site, random: Random) -> Outcome:
    """Kill one rank: the other cannot continue, and the run says which rank ended, and how."""
    victim = random.randrange(2)
    outcome = _without(site, random, lambda trial: trial.ranks()[victim])
    named = f"rank {victim} (process " in outcome.message and "SIGKILL" in outcome.message
    return replace(outcome, survived=outcome.survived and named)


def launcher(site: Site, random: Random) -> Outcome:
    """Kill the launcher of the ranks: they end with it."""
    return _without(site, random, Trial.launcher)


@dataclass(frozen=True)
class End:
    """A way to end a complete run."""

    strike: Callable[[Trial], None]
    status: int
    """Of `lora run`."""
    state: str
    """Its state in Prefect afterwards."""

    def inject(self, site: Site, random: Random) -> Outcome:
        """End a run and resume it: no process outlives it, and Prefect has its final state."""
        trial = site.run()
        trial.start()
        done = trial.at_step(_some_step(random))
        self.strike(trial)
        since = time.monotonic()
        status = trial.ended()
        message = last_line(trial.output()) if status > 0 else "(nothing: it was killed)"
        outcome = trial.resume(done=done, since=since, message=message, clear=status == self.status)
        return replace(
            outcome, survived=outcome.survived and trial.states() == [self.state, "COMPLETED"]
        )


KILLED = End(lambda trial: trial.send(signal.SIGKILL), -signal.SIGKILL, "CRASHED")
INTERRUPTED = End(lambda trial: trial.send(signal.SIGINT), 130, "CANCELLED")
"""Ctrl-C."""
ALL_ENDED = End(
    lambda trial: trial.send(signal.SIGTERM, everything=True), 128 + signal.SIGTERM, "CANCELLED"
)
"""Each process of the run, also its server, receives SIGTERM, as from `scancel` and systemd."""
ENDS = (ALL_ENDED, INTERRUPTED, KILLED)


def hanging_rank(site: Site, random: Random) -> Outcome:
    """Suspend a rank: the run names it, and ends after the stall limit."""
    trial = site.training()
    trial.start()
    done = trial.at_step(_some_step(random))
    victim = random.randrange(2)
    trial.ranks()[victim].suspend()
    since = time.monotonic()
    status, output = trial.ended(), trial.output()
    named = [
        line
        for line in output.splitlines()
        if line.startswith(f"rank {victim} on ") and "nothing has moved for" in line
    ]
    return trial.resume(
        done=done,
        since=since,
        message=named[0] if named else output,
        clear=status != 0 and bool(named),
    )


def second_run(site: Site, random: Random) -> Outcome:
    """Start the same training while it runs: the second is refused and has no effect."""
    first, done = site.training(), _some_step(random)
    first.start()
    first.at_step(done)
    second = Trial(site, first.stage, first.runs / "second", [])
    second.runs.mkdir()
    since = time.monotonic()
    status, message = second.start().wait(), last_line(second.output())
    seconds = time.monotonic() - since
    refused = status != 0 and "another run is working in" in message
    return Outcome(
        refused and first.ended() == 0 and first.is_identical() and len(first.starts()) == 1,
        0,
        seconds,
        message,
    )


def _without(site: Site, random: Random, victim: Callable[[Trial], Process]) -> Outcome:
    """Kill a process of a training, which then ends with an error in one line."""
    trial = site.training()
    trial.start()
    done = trial.at_step(_some_step(random))
    victim(trial).kill()
    since = time.monotonic()
    status, message = trial.ended(), last_line(trial.output())
    return trial.resume(
        done=done, since=since, message=message, clear=status != 0 and message.startswith("error: ")
    )


def _some_step(random: Random) -> int:
    """Return a step after the first checkpoint and well before the end."""
    return random.randrange(EVERY + 1, STEPS // 2)
