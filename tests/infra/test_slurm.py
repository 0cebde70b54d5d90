"""The SLURM script runs with a fake `srun`, which starts each task here, and a fake `lora`."""

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
options, command = {}, []
for word in sys.argv[1:]:
    if word.startswith("--") and "=" in word:
        name, _, value = word[2:].partition("=")
        options[name] = value
    else:
        command.append(word)
assert options["nodes"] == options["ntasks"], "one task per node"
tasks = []
for task in range(int(options["nodes"])):
    node = os.environ["NODES"].split()[int(options["relative"]) + task]
    env = {**os.environ, "SLURM_PROCID": str(task), "SLURMD_NODENAME": node}
    tasks.append(subprocess.Popen(command, env=env))
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader of one line closes the pipe
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(os.environ["NODES"].split()))
else:
    with open("scontrol.txt", "a") as changes:
        print(*sys.argv[1:], file=changes)
"""
LORA = """
import os, signal, sys, time
node = os.environ["SLURMD_NODENAME"]
def ended(*_):
    open(f"ended-{node}", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, ended)
words = [*sys.argv[1:], os.environ["LORA_MAIN_ADDRESS"], os.environ["LORA_RUNS"]]
with open(f"started-{node}.part", "w") as started:
    print(*words, sep="|", file=started)
os.rename(started.name, f"started-{node}")
while not os.path.exists(f"end-{node}"):
    time.sleep(0.02)
sys.exit(int(open(f"end-{node}").read()))
"""


@dataclass
class Job:
    """A job on three nodes, which communicate with the test through files."""

    folder: Path

    def write(self, machines: int) -> None:
        """Write a repository with a recipe and the fake programs."""
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
        """Start the script as SLURM does on the first node."""
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
        with (self.folder / "stderr.txt").open("w") as stderr:
            return subprocess.Popen(
                ["bash", str(SCRIPT), *arguments],
                env=env | given,
                stderr=stderr,
                start_new_session=True,
            )

    def end(self, node: str, status: int) -> None:
        """Make a node's command exit."""
        (self.folder / f"end-{node}.part").write_text(str(status))
        (self.folder / f"end-{node}.part").rename(self.folder / f"end-{node}")

    def files(self, kind: str) -> set[str]:
        return {path.name.removeprefix(f"{kind}-") for path in self.folder.glob(f"{kind}-node-?")}

    def command(self, node: str) -> list[str]:
        """Return the arguments of `lora` on a node, its main address and its runs folder."""
        return (self.folder / f"started-{node}").read_text().strip().split("|")

    def changes(self) -> str:
        """Return the arguments of the calls of scontrol that change the job."""
        path = self.folder / "scontrol.txt"
        return path.read_text() if path.exists() else ""

    def stderr(self) -> str:
        return (self.folder / "stderr.txt").read_text()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path)
    job.write(machines=3)
    return job


@pytest.fixture
def running(job: Job) -> "Iterator[subprocess.Popen[bytes]]":
    """Yield the script once all three nodes have started."""
    script = job.start(3, "recipe.yaml", "--rank", "8")
    try:
        until(lambda: job.files("started") == set(NODES))
        yield script
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.05)


def test_first_node_runs_the_recipe_and_the_others_join(
    job: Job, running: "subprocess.Popen[bytes]"
) -> None:
    environment = ["node-a:23456", str(job.folder / "runs")]
    assert job.command("node-a") == ["run", "recipe.yaml", "--rank", "8", *environment]
    assert job.command("node-b") == ["join", "--machine", "1", *environment]
    assert job.command("node-c") == ["join", "--machine", "2", *environment]


@pytest.mark.parametrize("status", [0, 2])
def test_first_node_ends_the_others_and_its_status_is_the_jobs(
    job: Job, running: "subprocess.Popen[bytes]", status: int
) -> None:
    job.end("node-a", status)
    assert running.wait(60) == status
    assert job.files("ended") == {"node-b", "node-c"}
    assert job.changes() == ""


def test_lost_node_ends_the_run(job: Job, running: "subprocess.Popen[bytes]") -> None:
    job.end("node-b", 1)
    job.end("node-c", 1)
    assert running.wait(60) == 143
    assert job.files("ended") == {"node-a"}
    assert job.changes() == ""
    assert "resumes from its last checkpoint" in job.stderr()


def test_job_stops_in_order_and_is_requeued_before_the_time_limit(
    job: Job, running: "subprocess.Popen[bytes]"
) -> None:
    running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 143
    assert job.files("ended") == set(NODES)
    assert job.changes() == "requeue 123456\n"


def test_canceled_job_is_not_requeued(job: Job, running: "subprocess.Popen[bytes]") -> None:
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    assert job.files("ended") == set(NODES)
    assert job.changes() == ""
    assert job.stderr() == ""


def test_single_node_runs_alone(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.write(machines=1)
    job.end("node-a", 0)
    assert job.start(1, "recipe.yaml").wait(60) == 0
    assert job.files("started") == {"node-a"}


def test_recipe_for_another_number_of_nodes_is_refused_before_the_start(job: Job) -> None:
    assert job.start(2, "recipe.yaml").wait(60) == 2
    assert (
        job.stderr()
        == "error: launch.machines of recipe.yaml is 3, and the job has 2 nodes; make them equal\n"
    )
    assert job.files("started") == set()


def test_missing_recipe_is_an_error(job: Job) -> None:
    assert job.start(3).wait(60) != 0
    assert "name a recipe" in job.stderr()
