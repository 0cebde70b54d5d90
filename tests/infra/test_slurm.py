"""The SLURM script runs for real, on stand-ins: an `srun` that starts each task here, and a `lora` that does as it is told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny import tiny_recipe

SCRIPT = Path(__file__).parents[2] / "infra" / "slurm" / "finetune.sbatch"
NODES = ("node-a", "node-b", "node-c")

SRUN = """
import os, signal, subprocess, sys
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--") and "=" in word)
command = [word for word in sys.argv[1:] if not (word.startswith("--") and "=" in word)]
assert options["nodes"] == options["ntasks"], "one task a node"
tasks = []
for task in range(int(options["nodes"])):
    node = os.environ["NODES"].split()[int(options["relative"]) + task]
    tasks.append(subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(task), "SLURMD_NODENAME": node}))
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads one line closes the pipe
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(os.environ["NODES"].split()))
else:
    with open("scontrol.txt", "a") as told:
        print(*sys.argv[1:], file=told)
"""
LORA = """
import os, signal, sys, time
node = os.environ["SLURMD_NODENAME"]
def ended(*_):
    open(f"ended-{node}", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, ended)
with open(f"began-{node}.part", "w") as began:
    print(*sys.argv[1:], os.environ["LORA_MAIN_ADDRESS"], os.environ["LORA_RUNS"], sep="|", file=began)
os.rename(began.name, f"began-{node}")
while not os.path.exists(f"end-{node}"):
    time.sleep(0.02)
sys.exit(int(open(f"end-{node}").read()))
"""


@dataclass
class Job:
    """A job on three nodes, which are folders' worth of files here."""

    folder: Path

    def write(self, machines: int) -> None:
        """Lay out a repository with a recipe, and the stand-ins."""
        recipe = tiny_recipe(
            self.folder,
            self.folder / "pairs.jsonl",
            launch={"processes": machines, "machines": machines},
        )
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("lora", LORA)):
            self.executable(name, f"#!{sys.executable}\n{text}")
        self.executable("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')

    def executable(self, name: str, text: str) -> None:
        path = self.folder / ".venv" / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, nodes: int, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start the script as SLURM starts it on the first node."""
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LORA_", "SLURM_"))
        }
        given = {
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node-[a-c]",
        }
        given |= {"SLURM_JOB_NUM_NODES": str(nodes), "NODES": " ".join(NODES[:nodes])}
        with (self.folder / "said.txt").open("w") as said:
            return subprocess.Popen(
                ["bash", str(SCRIPT), *arguments],
                env=env | given,
                stderr=said,
                start_new_session=True,
            )

    def end(self, node: str, status: int) -> None:
        """Have a node's command end by itself."""
        (self.folder / f"end-{node}.part").write_text(str(status))
        (self.folder / f"end-{node}.part").rename(self.folder / f"end-{node}")

    def files(self, kind: str) -> set[str]:
        return {path.name.removeprefix(f"{kind}-") for path in self.folder.glob(f"{kind}-node-?")}

    def began(self, node: str) -> list[str]:
        return (self.folder / f"began-{node}").read_text().strip().split("|")

    def told(self) -> str:
        """Return what scontrol was asked to change."""
        path = self.folder / "scontrol.txt"
        return path.read_text() if path.exists() else ""

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path)
    job.write(machines=3)
    return job


@pytest.fixture
def running(job: Job) -> "Iterator[subprocess.Popen[bytes]]":
    """Yield the script when all three nodes have begun."""
    script = job.start(3, "recipe.yaml", "--rank", "8")
    try:
        until(lambda: job.files("began") == set(NODES))
        yield script
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()


def until(claim: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.05)


def test_the_first_node_runs_the_recipe_and_the_others_join_by_number(
    job: Job, running: "subprocess.Popen[bytes]"
) -> None:
    place = ["node-a:23456", str(job.folder / "runs")]
    assert job.began("node-a") == ["run", "recipe.yaml", "--rank", "8", *place]
    assert job.began("node-b") == ["join", "--machine", "1", *place]
    assert job.began("node-c") == ["join", "--machine", "2", *place]


@pytest.mark.parametrize("status", [0, 2])
def test_the_end_of_the_first_node_ends_the_others_and_its_status_is_the_jobs(
    job: Job, running: "subprocess.Popen[bytes]", status: int
) -> None:
    job.end("node-a", status)
    assert running.wait(60) == status
    assert job.files("ended") == {"node-b", "node-c"}
    assert job.told() == ""


def test_a_node_that_is_lost_ends_the_run(job: Job, running: "subprocess.Popen[bytes]") -> None:
    job.end("node-b", 1)
    job.end("node-c", 1)
    assert running.wait(60) == 143
    assert job.files("ended") == {"node-a"}
    assert job.told() == ""
    assert "goes on from its last checkpoint" in job.said()


def test_before_the_time_limit_all_end_in_order_and_the_job_is_queued_again(
    job: Job, running: "subprocess.Popen[bytes]"
) -> None:
    running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 143
    assert job.files("ended") == set(NODES)
    assert job.told() == "requeue 123456\n"


def test_a_job_that_is_cancelled_is_not_queued_again(
    job: Job, running: "subprocess.Popen[bytes]"
) -> None:
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    assert job.files("ended") == set(NODES)
    assert job.told() == ""
    assert job.said() == ""


def test_one_node_runs_alone(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.write(machines=1)
    job.end("node-a", 0)
    assert job.start(1, "recipe.yaml").wait(60) == 0
    assert job.files("began") == {"node-a"}


def test_a_recipe_for_another_number_of_nodes_is_refused_before_anything_starts(job: Job) -> None:
    assert job.start(2, "recipe.yaml").wait(60) == 2
    assert (
        job.said()
        == "error: launch.machines of recipe.yaml is 3, and the job has 2 nodes; make them equal\n"
    )
    assert job.files("began") == set()


def test_a_recipe_is_asked_for(job: Job) -> None:
    assert job.start(3).wait(60) != 0
    assert "name a recipe" in job.said()
