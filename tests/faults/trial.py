"""A training of two ranks in a separate process that is interrupted by a fault and resumed.

It survives if it equals an uninterrupted training: the same loss at every step, and the same
adapter, bit for bit.
"""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from command import environment_of_stages, shared_imports_at
from distributed.trainings import Trainings, losses
from distributed.two_hosts import RUN_TRAINING, pickled
from prefect_host import LORA, PrefectHost, prefect_host
from prefect_tables import add_tables
from tiny import tiny_recipe

from pipelines.config.sections import LaunchSection
from pipelines.runtime import shared_imports
from pipelines.runtime.heartbeats import read_heartbeats
from pipelines.runtime.launcher import REPOSITORY
from pipelines.runtime.stage import LOG, Stage

STEPS, EVERY = 64, 4
"""Optimizer steps of a training, and between its checkpoints."""
PREFECT_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d+ \| ")
LAUNCH = LaunchSection(config="cpu_zero2", processes=2, timeout_seconds=20, stall_seconds=8)
QUICK: dict[str, Any] = {
    "control": {"method": "none"},
    "lora": {"ranks": [4]},
    "training": {
        "steps": STEPS,
        "checkpoint_every": EVERY,
        "batch_size": 48,
        "dtype": "bfloat16",
    },
    "launch": LAUNCH.model_dump(),
    "evaluation": {
        "general": ["piqa"],
        "items_per_benchmark": 2,
        "generations": 1,
        "chat_prompts": 0,
        "passages": 0,
    },
}
"""One adapter rank, few questions."""
STRUCK_RUN = Path(__file__).with_name("struck_run.py")
STATED = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "LORA_RUNS")
"""Environment variables that a trial sets or removes."""
GONE_SECONDS = 45
"""Time after which no process of an ended run may be alive."""


@dataclass(frozen=True)
class Outcome:
    """What a fault did to a run."""

    survived: bool
    lost: int
    """Steps that were repeated."""
    seconds: float
    """From the fault until the run reached the same step again."""
    message: str
    """What the run reported."""


@dataclass
class Site:
    """A tiny model with rows and base, prepared once, and an uninterrupted training."""

    trainings: Trainings
    expected: Stage
    environment: dict[str, str] = field(default_factory=dict)
    """Of every trial."""
    _trials: int = 0

    _open: ExitStack = field(default_factory=ExitStack)
    _host: PrefectHost | None = None

    @classmethod
    @contextmanager
    def prepared(cls, root: Path) -> "Iterator[Site]":
        """Prepare all, and train once; at the end of the block, end all that the trials started."""
        trainings = Trainings.prepare(root)
        site = cls(trainings, trainings.stage("LoRA", "undisturbed", 2, **QUICK))
        undisturbed = Trial(site, site.expected, root / "undisturbed", [])
        imports = root / "imports"
        of_stages = environment_of_stages(undisturbed.variables())
        with site._open, shared_imports_at(imports, of_stages):
            site.environment = {shared_imports.VARIABLE: str(imports)}
            assert undisturbed.start().wait() == 0, undisturbed.output()
            yield site

    @property
    def host(self) -> PrefectHost:
        """Return a Prefect server with a worker; the first call starts them."""
        if self._host is None:
            folder = self.trainings.root / "host"
            folder.mkdir()
            self._host = self._open.enter_context(prefect_host(folder))
        return self._host

    def training(self) -> "Trial":
        """Return a training for one trial."""
        stage, place = self._next()
        return Trial(self, stage, place, [])

    def run(self, **environment: str) -> "Trial":
        """Return a complete `lora run` for one trial, whose base and data are prepared."""
        stage, place = self._next()
        shutil.copytree(self.trainings.root / "shared", place, dirs_exist_ok=True)
        add_tables(place / "prefect")
        return Trial(self, stage, place, [LORA, "run", str(self.recipe())], environment)

    def recipe(self) -> Path:
        """Write the recipe of the trainings."""
        values = tiny_recipe(
            self.trainings.root / "model",
            self.trainings.root / "pairs.jsonl",
            base_model={"quantization": "none"},
            **QUICK,
        )
        path = self.trainings.root / "quick.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def _next(self) -> tuple[Stage, Path]:
        self._trials += 1
        name = f"trial-{self._trials}"
        return self.trainings.stage("LoRA", name, 2, **QUICK), self.trainings.root / name


@dataclass
class Trial:
    """One training, or the complete run around it."""

    site: Site
    stage: Stage
    """The training's."""
    runs: Path
    """Folder of runs, which identifies its processes."""
    argv: list[str]
    """Command of a complete run; empty for a training alone."""
    environment: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(
        self, strike: str = "", prefix: tuple[str, ...] = (), **environment: str
    ) -> "subprocess.Popen[bytes]":
        """Start or resume it; `strike` is a fault inside the ranks, see `struck`."""
        file = pickled(self.stage, LAUNCH, self.runs / "stage.pickle")
        argv = self.argv or [sys.executable, str(RUN_TRAINING), str(file), *filter(None, [strike])]
        if self.argv and strike:
            argv = [sys.executable, str(STRUCK_RUN), strike, *self.argv[1:]]
        with (self.runs / "output.txt").open("wb") as stream:
            self.process = subprocess.Popen(
                [*prefix, *argv],
                env={**self.variables(), **environment},
                stdout=stream,
                stderr=stream,
                cwd=self.runs,
                preexec_fn=accept_interrupts,
            )
        return self.process

    def variables(self) -> dict[str, str]:
        """Return the environment of a run."""
        clean = {name: value for name, value in os.environ.items() if name not in STATED}
        return {
            **clean,
            "LORA_RUNS": str(self.runs),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "300",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            **self.site.environment,
            **self.environment,
        }

    def send(self, one: signal.Signals, *, everything: bool = False) -> None:
        """Send a signal to the started process, or to each process of the trial."""
        for process in self.processes() if everything else filter(None, [self.process]):
            with suppress(psutil.NoSuchProcess):  # it may end because another ended
                process.send_signal(one)

    def output(self) -> str:
        """Return the output of the run since its last start."""
        return (self.runs / "output.txt").read_text(errors="replace")

    def log(self) -> str:
        """Return the log of the ranks, over all attempts."""
        path = self.stage.folder / LOG
        return path.read_text(errors="replace") if path.is_file() else ""

    def starts(self) -> list[int]:
        """Return the step from which each attempt started."""
        return [int(step) for step in re.findall(r"from step (\d+)$", self.log(), re.MULTILINE)]

    def steps(self) -> int:
        """Return how many steps are done."""
        return len(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics of the steps that are done."""
        path = self.stage.folder / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().split("\n")[:-1]]
            if path.is_file()
            else []
        )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for a condition; on timeout raise AssertionError with the output."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"timed out: {self.output()[-1500:]} {self.log()[-1500:]}"
            )
            time.sleep(0.01)

    def at_step(self, steps: int, attempt: int = 1) -> int:
        """Wait until `steps` steps of the training are done in an attempt, or the run has ended.

        Returns the number of steps that are done.
        """
        process = self.process  # None if a worker started the run
        ended = (lambda: False) if process is None else (lambda: process.poll() is not None)
        self.wait_for(lambda: (len(self.starts()) >= attempt and self.steps() >= steps) or ended())
        return self.steps()

    def processes(self) -> list[psutil.Process]:
        """Return its processes that are alive."""
        return [
            one for one in psutil.process_iter() if one.pid != os.getpid() and self._is_own(one)
        ]

    def _is_own(self, process: psutil.Process) -> bool:
        """Return whether a process has the run's environment, or writes to a log of the run.

        A forked process shows the environment with which its server was started.
        """
        if variable(process, "LORA_RUNS") == str(self.runs):
            return True
        with suppress(OSError):
            return Path(f"/proc/{process.pid}/fd/1").readlink().is_relative_to(self.runs)
        return False

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that train, by rank."""
        alive = {one.pid: one for one in self.processes()}
        beats = []
        for folder in self.runs.glob("train/*"):
            beats += [beat for beat in read_heartbeats(folder) if beat.process in alive]
        return [alive[beat.process] for beat in sorted(beats, key=lambda beat: beat.rank)]

    def launcher(self) -> psutil.Process:
        """Return the process that started the ranks."""
        parent = self.ranks()[0].parent()
        assert parent is not None
        return parent

    def nothing_left(self, seconds: float = GONE_SECONDS) -> bool:
        """Wait until none of its processes is alive; return whether that was in time."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes()

    def ended(self, seconds: float = 120) -> int:
        """Wait for the run to end; return its status."""
        assert self.process is not None
        return self.process.wait(seconds)

    def resume(
        self, *, done: int, since: float, message: str, clear: bool = True, **environment: str
    ) -> Outcome:
        """Start again after a fault, and run to the end.

        Args:
            done: steps before the fault.
            since: time of the fault on the monotonic clock.
            message: what the run reported.
            clear: whether all expectations were met so far.
            environment: of the second attempt.
        """
        attempts = len(self.starts())
        gone = self.nothing_left()
        self.start(**environment)
        self.at_step(min(done + 1, STEPS), attempts + 1)
        seconds = time.monotonic() - since
        status = self.ended(300)
        lost = (
            done - self.starts()[-1] if len(self.starts()) > attempts else 0
        )  # none if the fault came after the last step
        return Outcome(
            clear and gone and status == 0 and self.is_identical(), lost, seconds, message
        )

    def is_identical(self) -> bool:
        """Return whether losses and adapter equal those of the uninterrupted training."""
        files = [
            (one.folder / "adapter" / "adapter_model.safetensors")
            for one in (self.stage, self.site.expected)
        ]
        if not all(path.is_file() for path in files):
            return False
        return (
            losses(self.stage) == losses(self.site.expected)
            and files[0].read_bytes() == files[1].read_bytes()
        )

    def checkpoints(self) -> list[Path]:
        """Return its checkpoints, the newest last."""
        return sorted((self.stage.folder / "checkpoints").glob("step-*"))

    def states(self) -> list[str]:
        """Return the Prefect state of each attempt at a complete run, from the run's own server."""
        with closing(sqlite3.connect(self.runs / "prefect" / "prefect.db")) as kept:
            return [
                state
                for (state,) in kept.execute("SELECT state_type FROM flow_run ORDER BY start_time")
            ]

    def summary(self) -> dict[str, Any]:
        """Return the summary of a complete run."""
        values: dict[str, Any] = json.loads(
            (self.runs / "pairs_tiny_cpu" / "summary.json").read_text()
        )
        return values


def accept_interrupts() -> None:
    """Let Ctrl-C reach the process: a shell blocks it for background processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def variable(process: psutil.Process, name: str) -> str | None:
    """Return an environment variable of a process; None if it is unset or not readable."""
    try:
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None


def last_line(text: str) -> str:
    """Return the last line that is not Prefect's, which may still send events at the end."""
    lines = []
    for line in text.splitlines():
        if line.strip() and not PREFECT_LINE.match(line):
            lines.append(line.strip())
    return lines[-1] if lines else ""
