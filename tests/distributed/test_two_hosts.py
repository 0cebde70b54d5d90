"""Two hosts train like two ranks of one host.

When the cable is pulled, both ends name the lost rank, and the run resumes afterwards.
"""

import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from distributed.trainings import Trainings, farthest, losses, outcome, train_all
from distributed.two_hosts import TwoHosts, objection, pickled, processes_on, two_hosts
from pipelines.config.sections import LaunchSection
from pipelines.runtime.stage import Stage

REASON = objection()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.xdist_group("two hosts"),
]
TIMEOUT = 15
"""Seconds that a rank waits for another here."""
STEPS = 80
LAUNCH = LaunchSection(config="cpu_zero2", processes=2, machines=2, timeout_seconds=TIMEOUT)


@pytest.fixture(scope="module")
def hosts(trainings: Trainings) -> Iterator[TwoHosts]:
    with two_hosts(trainings.root / "hosts") as made:
        yield made


def staged(trainings: Trainings, runs: str) -> Stage:
    many = {"steps": STEPS, "checkpoint_every": 4}
    return trainings.stage("QLoRA", runs, 2, training=many, launch=LAUNCH.model_dump())


def test_both_ends_name_the_lost_rank_and_the_run_resumes(
    trainings: Trainings, hosts: TwoHosts
) -> None:
    together = trainings.stage(
        "QLoRA", "one-host", 2, training={"steps": STEPS, "checkpoint_every": 4}
    )
    train_all("cpu_zero2", 2, [str(together.folder)], trainings.root / "one-host.log")
    stage = staged(trainings, "hosts")
    file = pickled(stage, LAUNCH, trainings.root / "stage.pickle")
    second = hosts.join()
    try:
        first = hosts.train(file)
        wait_for_steps(stage, 6, first)
        hosts.pull_cable()
        started = time.monotonic()
        output, _ = first.communicate(timeout=TIMEOUT + 90)
        assert first.returncode == 1 and time.monotonic() - started < TIMEOUT + 60
        assert (
            "lost rank 1 on node-b in step" in output or "lost rank 0 on node-a in step" in output
        ), output
        wait_until_quiet("node-b", at_most=1)
        assert "lost rank 0 on node-a" in (stage.folder / "log-1.txt").read_text()
        assert "lost rank 1 on node-b" in (stage.folder / "log.txt").read_text()
        hosts.plug_cable()
        again = hosts.train(file)
        output, _ = again.communicate(timeout=240)
        assert again.returncode == 0, output
    finally:
        second.terminate()
        second.communicate(timeout=60)
    log = (stage.folder / "log.txt").read_text()
    assert "from step 0" in log and re.search(r"from step [1-9]", log), log[-2000:]
    assert losses(stage) == pytest.approx(losses(together), abs=2e-6)
    assert farthest(outcome(together), outcome(stage)) < 5e-5


def wait_for_steps(stage: Stage, steps: int, child: "subprocess.Popen[str]") -> None:
    """Wait until that many steps are done."""
    metrics = stage.folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") >= steps:
            return
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"{steps} steps took too long")


def wait_until_quiet(node: str, at_most: int) -> None:
    """Wait until at most `at_most` processes are left on a host."""
    deadline = time.monotonic() + TIMEOUT + 60
    while len(processes_on(node)) > at_most and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(processes_on(node)) <= at_most
