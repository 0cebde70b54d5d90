"""A run that a Prefect worker started is cancelled on its page, or loses its worker."""

import time
from random import Random

from prefect_host import until

from faults.trial import EVERY, GONE_SECONDS, Outcome, Site, Trial

EARLY = 5 * EVERY
"""A cancellation takes seconds to reach the run, which must not end before it."""


def cancelled(site: Site, random: Random) -> Outcome:
    """Cancel the run: every process ends in time, the slot is free, the state is Cancelled."""
    trial, run = _deployed(site)
    done = trial.at_step(random.randrange(EVERY + 1, EARLY))
    site.host.cancel(run)
    return _cut_short(trial, run, done, "CANCELLED")


def killed_worker(site: Site, random: Random) -> Outcome:
    """Kill the worker: its run ends with it, and no process is left."""
    trial, run = _deployed(site)
    done = trial.at_step(random.randrange(EVERY + 1, EARLY))
    site.host.kill_worker()
    try:
        return _cut_short(trial, run, done, "CRASHED")
    finally:
        site.host.start_worker()


def _deployed(site: Site) -> tuple[Trial, str]:
    """Start a run by the worker; return its trial and its id."""
    trial, host = site.run(), site.host
    deployed = host.lora("deploy", str(site.recipe()), LORA_RUNS=str(trial.runs))
    assert deployed.returncode == 0, deployed.stderr
    return trial, host.run(host.deployment("pairs_tiny_cpu")["id"])


def _cut_short(trial: Trial, run: str, done: int, state: str) -> Outcome:
    since, host = time.monotonic(), trial.site.host
    try:
        until(
            lambda: host.state(run) == state and host.slots() == [0] and not trial.processes(),
            seconds=GONE_SECONDS,
        )
        clear = True
    except TimeoutError:
        clear = False
    done = max(done, trial.steps())
    gone = time.monotonic() - since
    alive = len(trial.processes())
    message = (
        f"{host.state(run)}, slots taken {host.slots()}, {alive} processes alive after {gone:.1f} s"
    )
    return trial.resume(done=done, since=since, message=message, clear=clear)
