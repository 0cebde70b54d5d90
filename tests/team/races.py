"""Concurrent registrations, and promotions that are killed."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from mlflow_accounts import ADMIN, ADMIN_PASSWORD, logged_in
from parity.rows import Row, at_least, at_most, figure
from registered import SmallVersions, register, retrained
from summaries import Summary
from team.team_server import CANDIDATES, NAME, TeamServer
from team.transcript import comparison, holds

from pipelines.errors import RegistryError

LEASE_SECONDS = 5
"""A killed process blocks the name for so long; two minutes outside of tests."""
PROMOTE = (
    "import sys\n"
    "from pathlib import Path\n"
    "from pipelines.tracking import lease\n"
    f"lease.LEASE_SECONDS = {LEASE_SECONDS}.0\n"
    "from pipelines.tracking.open_decision import Grounds\n"
    "from pipelines.tracking.references import Reference\n"
    "from pipelines.tracking.releases import promote_candidate\n"
    "print('started', flush=True)\n"
    "grounds = Grounds('killed or not', force=True)\n"
    "promote_candidate(Reference.parse(sys.argv[1]), grounds, Path(sys.argv[2]))\n"
)


def registrations(server: TeamServer, count: int) -> Iterator[Row]:
    """Register as many adapters at the same time; each gets one version."""
    import mlflow

    model = "raced"
    base = comparison(server.folder / "raced")
    base["recipe"]["registry"] = {"model": model, "experiment": model}
    base["registered_champion"] = None
    comparisons = [retrained(base, f"weights-{index}") for index in range(count)]
    comparisons += comparisons[: count // 4]  # some bytes twice
    with logged_in(ADMIN, ADMIN_PASSWORD):
        started = time.monotonic()
        with ThreadPoolExecutor(len(comparisons)) as pool:
            promoted = sum(pool.map(lambda one: _registers(server, one), comparisons))
        seconds = time.monotonic() - started
        versions = mlflow.MlflowClient().search_model_versions(f"name = '{model}'")
    digests = {version.tags["adapter_sha256"] for version in versions}
    yield figure("races: concurrent registrations", len(comparisons))
    yield figure("races: all registrations", seconds, "s")
    yield at_most("races: versions beyond one per digest", abs(len(versions) - len(digests)), 0)
    yield at_most("races: digests without a version", abs(count - len(digests)), 0)
    yield at_least("races: registrations that promoted their adapter", promoted, 1)


def _registers(server: TeamServer, summary: Summary) -> bool:
    """Register a comparison; return whether it moved the champion."""
    try:
        return "champion" in register(summary, server.runs).aliases
    except RegistryError as error:
        if "was compared with" in str(error):  # another one was faster
            return False
        raise


def killed_promotions(server: TeamServer, count: int, seed: int) -> Iterator[Row]:
    """Kill promotions at random times; then each succeeds, once."""
    chance = random.Random(seed)
    with logged_in(ADMIN, ADMIN_PASSWORD):
        versions = SmallVersions(server.runs, server.folder / "killed")
        references = [
            f"{CANDIDATES}/{versions.add(CANDIDATES, f'killed {index}')}" for index in range(count)
        ]
    killed = 0
    for reference in references:
        killed += _kill(server, reference, chance.uniform(0.2, 2.0))
        ended = _start(server, reference)
        ended.wait(600)
    import mlflow

    with logged_in(ADMIN, ADMIN_PASSWORD):
        found = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
    digests = [version.tags["adapter_sha256"] for version in found]
    yield figure("kills: promotions ended with SIGKILL", killed)
    yield holds("kills: each promotion made one version", len(digests) == len(set(digests)))
    verified = server.lora("carl", "registry", "verify", f"{NAME}@champion")
    yield holds("kills: the champion is intact", verified.returncode == 0)
    history = server.lora("carl", "registry", "history", NAME, "--json")
    yield at_least("kills: promotions in the log", history.stdout.count("killed or not"), count)


def _start(server: TeamServer, reference: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", PROMOTE, reference, str(server.runs)]
    return subprocess.Popen(
        command, env=server.environment(ADMIN), stdout=subprocess.PIPE, cwd=server.folder
    )


def _kill(server: TeamServer, reference: str, seconds: float) -> int:
    """Kill a promotion some time after its start; return how many were killed."""
    promotion = _start(server, reference)
    assert promotion.stdout is not None
    promotion.stdout.readline()
    time.sleep(seconds)
    promotion.send_signal(signal.SIGKILL)
    promotion.stdout.close()
    return int(promotion.wait(60) == -signal.SIGKILL)
