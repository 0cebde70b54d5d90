"""Processes that are killed with SIGKILL at a random step, or asked to stop."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from psutil import Process

from faults.trial import EVERY, STEPS, Outcome, Site, Trial, last_line


def rank(site: Site, random: Random) -> Outcome:
    """Kill one rank: the other cannot go on, and the run says which one was lost."""
    return _without(site, random, lambda trial: trial.ranks()[random.randrange(2)])


def launcher(site: Site, random: Random) -> Outcome:
    """Kill what started the ranks: they end with it."""
    return _without(site, random, Trial.launcher)


@dataclass(frozen=True)
class End:
    """A way in which a whole run is ended."""

    strike: Callable[[Trial], None]
    status: int
    """Of `lora run`."""
    state: str
    """What Prefect calls it afterwards."""

    def inject(self, site: Site, random: Random) -> Outcome:
        """End a run and go on with it: nothing that it started outlives it, and Prefect knows what became of it."""
        trial = site.run()
        trial.begin()
        done = trial.at_step(_some_step(random))
        self.strike(trial)
        since = time.monotonic()
        status = trial.ended()
        said = last_line(trial.said()) if status > 0 else "(nothing: it was killed)"
        outcome = trial.go_on(done=done, since=since, said=said, clear=status == self.status)
        return replace(
            outcome, survived=outcome.survived and trial.states() == [self.state, "COMPLETED"]
        )


KILLED = End(lambda trial: trial.send(signal.SIGKILL), -signal.SIGKILL, "CRASHED")
INTERRUPTED = End(lambda trial: trial.send(signal.SIGINT), 130, "CANCELLED")
"""Ctrl-C."""
ALL_ENDED = End(
    lambda trial: trial.send(signal.SIGTERM, everything=True), 128 + signal.SIGTERM, "CANCELLED"
)
"""Each process of the run is asked to end, its server too, as by `scancel` and systemd."""
ENDS = (ALL_ENDED, INTERRUPTED, KILLED)


def hanging_rank(site: Site, random: Random) -> Outcome:
    """Stop a rank in its tracks: it is named, and the run ends when its time is over."""
    trial = site.training()
    trial.begin()
    done = trial.at_step(_some_step(random))
    victim = random.randrange(2)
    trial.ranks()[victim].suspend()
    since = time.monotonic()
    status, said = trial.ended(), trial.said()
    named = [
        line
        for line in said.splitlines()
        if line.startswith(f"rank {victim} on ") and "nothing has moved for" in line
    ]
    return trial.go_on(
        done=done, since=since, said=named[0] if named else said, clear=status != 0 and bool(named)
    )


def second_run(site: Site, random: Random) -> Outcome:
    """Start the same training while it is at work: the second is told so, and harms nothing."""
    first, done = site.training(), _some_step(random)
    first.begin()
    first.at_step(done)
    second = Trial(site, first.stage, first.runs / "second", [])
    second.runs.mkdir()
    since = time.monotonic()
    status, said = second.begin().wait(), last_line(second.said())
    seconds = time.monotonic() - since
    refused = status != 0 and "another run is working in" in said
    return Outcome(
        refused and first.ended() == 0 and first.is_whole() and len(first.starts()) == 1,
        0,
        seconds,
        said,
    )


def _without(site: Site, random: Random, victim: Callable[[Trial], Process]) -> Outcome:
    """Kill a process of a training, which ends with an error of one sentence."""
    trial = site.training()
    trial.begin()
    done = trial.at_step(_some_step(random))
    victim(trial).kill()
    since = time.monotonic()
    status, said = trial.ended(), last_line(trial.said())
    return trial.go_on(
        done=done, since=since, said=said, clear=status != 0 and said.startswith("error: ")
    )


def _some_step(random: Random) -> int:
    """Return a step after the first checkpoint and well before the end, which comes soon on a quick machine."""
    return random.randrange(EVERY + 1, STEPS // 2)
