"""A tracking server that is unreachable when a run publishes: for a minute, and for good."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil
from prefect_host import free_port

from faults.trial import Outcome, Site, last_line

AWAY_SECONDS = 60


def away_for_a_minute(site: Site, random: Random) -> Outcome:
    """Start the server a minute after the first request: the run waits and registers."""
    port = free_port()
    trial = site.run(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    trial.start()
    trial.wait_for(lambda: "retrying for" in trial.output(), seconds=300)
    since = time.monotonic()
    time.sleep(AWAY_SECONDS)
    with tracking_server(trial.runs, port):
        status = trial.ended(180)
        seconds = time.monotonic() - since - AWAY_SECONDS
    message = next(line.strip() for line in trial.output().splitlines() if "retrying for" in line)
    return Outcome(
        status == 0 and bool(trial.summary()["registered"]["versions"]) and trial.is_identical(),
        0,
        seconds,
        message,
    )


def gone_for_good(site: Site, random: Random) -> Outcome:
    """Start no server: the report is written, and the next run registers without training."""
    port = free_port()
    trial = site.run(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    trial.start(LORA_REGISTRY_SECONDS="2")
    status, message = trial.ended(300), last_line(trial.output())
    since = time.monotonic()
    reported = (
        trial.runs / "pairs_tiny_cpu" / "report.html"
    ).is_file() and not trial.summary().get("registered")
    with tracking_server(trial.runs, port):
        again = trial.start().wait(300)
    seconds = time.monotonic() - since
    registered = again == 0 and bool(trial.summary()["registered"]["versions"])
    return Outcome(
        status == 2 and reported and registered and trial.starts() == [0] and trial.is_identical(),
        0,
        seconds,
        message,
    )


@contextmanager
def tracking_server(folder: Path, port: int) -> Iterator[None]:
    """Run an MLflow server inside a block."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with (folder / "server.txt").open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options, *stores],
            stdout=stream,
            stderr=stream,
            cwd=folder,
        )
    try:
        yield
    finally:
        everything = [*psutil.Process(server.pid).children(recursive=True), server]
        for one in everything:
            one.terminate()
        server.wait(30)
