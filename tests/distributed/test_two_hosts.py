"""Two hosts train as two ranks of one do; when the cable is pulled both ends say who is gone, and the run goes on afterwards."""

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


def test_a_pulled_cable_is_named_by_both_ends_and_the_run_goes_on(
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
        begun = time.monotonic()
        said, _ = first.communicate(timeout=TIMEOUT + 90)
        assert first.returncode == 1 and time.monotonic() - begun < TIMEOUT + 60
        assert "lost rank 1 on node-b in step" in said or "lost rank 0 on node-a in step" in said, (
            said
        )
        wait_until_quiet("node-b", beside=1)
        assert "lost rank 0 on node-a" in (stage.folder / "log-1.txt").read_text()
        assert "lost rank 1 on node-b" in (stage.folder / "log.txt").read_text()
        hosts.plug_cable()
        again = hosts.train(file)
        said, _ = again.communicate(timeout=240)
        assert again.returncode == 0, said
    finally:
        second.terminate()
        second.communicate(timeout=60)
    log = (stage.folder / "log.txt").read_text()
    assert "from step 0" in log and re.search(r"from step [1-9]", log), log[-2000:]
    assert losses(stage) == pytest.approx(losses(together), abs=2e-6)
    assert farthest(outcome(together), outcome(stage)) < 5e-5


def wait_for_steps(stage: Stage, steps: int, child: "subprocess.Popen[str]") -> None:
    """Return when so many steps are done."""
    metrics = stage.folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") >= steps:
            return
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"{steps} steps took too long")


def wait_until_quiet(node: str, beside: int) -> None:
    """Return when no more processes than `beside` are left on a host."""
    deadline = time.monotonic() + TIMEOUT + 60
    while len(processes_on(node)) > beside and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(processes_on(node)) <= beside
