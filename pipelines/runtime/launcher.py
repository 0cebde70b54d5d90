"""Start a stage as a child process, follow it, and leave no process behind. Imports no torch.

What passes between parent and child are files in the stage's folder; the child's own output goes to log.txt there.
A stage's folder is locked while its child runs, so a second run of the same recipe is told so instead of doing harm.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from pipelines.console import Watch
from pipelines.errors import (
    EndedError,
    PeerError,
    RecipeError,
    StageError,
    no_space,
    recorded_error,
)
from pipelines.runtime.child import PARENT, PLACE, die_with_parent
from pipelines.runtime.heartbeats import Stalls, clear, read_notes
from pipelines.runtime.stage import LOG, Stage, read_result

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "infra" / "accelerate"
POLL_SECONDS = 0.5
ROOM_BYTES = 1 << 20
"""With less than this, a child that ended without a word had nowhere to leave one."""
ENDING = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals by which a process is ended from outside, and not by a fault of its own."""
GRACE_SECONDS = 15
"""Before a child that was asked to end is ended by force, with its ranks: Prefect's worker forces the whole run after 30."""
WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment in which neither PyTorch nor DeepSpeed sees a GPU; ROCm's PyTorch heeds it too."""
ALONE = ("--main_process_port", "0")
"""What accelerate's launcher is told where one host trains by itself: any free port will do."""


@dataclass
class StallMonitor:
    """How long no rank of a training may move before that is said, and before the training is ended."""

    warn_after: float
    """Seconds."""
    abort_after: float
    """Seconds."""
    report: Callable[[str], None]
    _warned: bool = False
    _noted: int = 0

    def check(self, stalls: Stalls) -> None:
        """Pass on what the run has noted, name the rank that holds the others up once, and raise StageError when it takes too long."""
        for text in read_notes(stalls.folder, self._noted):
            self._noted += 1
            self.report(text)
        seconds = stalls.seconds()
        if seconds < self.warn_after:
            self._warned = False
        elif not self._warned:
            self._warned = True
            self.report(stalls.words())
        if seconds > self.abort_after:
            raise StageError(
                f"{stalls.words()}, longer than launch.timeout_seconds {self.abort_after:g}; see that its host is well, and run again: "
                "it goes on from the last checkpoint",
                kind=PeerError.__name__,
            )


_running: "set[subprocess.Popen[bytes]]" = set()
"""Children at work, over all threads: an interrupted run ends those that other threads wait for."""


def python_argv(module: str, *folders: Path) -> list[str]:
    """Return the command of a stage, or of several, in one process."""
    return [sys.executable, "-m", module, *map(str, folders)]


def accelerate_argv(
    config: str, processes: int, folder: Path, place: Sequence[str] = ALONE
) -> list[str]:
    """Return the command that trains on `processes` ranks under a named accelerate config.

    Args:
        config: see `config_file`.
        processes: ranks on all hosts together.
        folder: the stage's.
        place: where this host stands among others, in the words of accelerate's launcher.
    """
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config_file(config)),
        *_deepspeed_file(config),
    ]
    return [
        *launcher,
        "--num_processes",
        str(processes),
        *place,
        "-m",
        "pipelines.training.train",
        str(folder),
    ]


def _deepspeed_file(config: str) -> list[str]:
    """Name DeepSpeed's own config by its whole path: accelerate would look for it where the command runs."""
    named = (yaml.safe_load(config_file(config).read_text()).get("deepspeed_config") or {}).get(
        "deepspeed_config_file"
    )
    path = None if named is None else REPOSITORY / named
    return ["--deepspeed_config_file", str(path)] if path is not None and path.is_file() else []


def config_file(name: str) -> Path:
    """Find an accelerate config by name in infra/accelerate, or by path.

    Raises:
        RecipeError: there is none.
    """
    for path in (CONFIGS / f"{name}.yaml", Path(name).expanduser()):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
    raise RecipeError(f"launch.config {name!r} is no file and none of infra/accelerate: {known}")


def run_child(
    stage: Stage,
    argv: list[str],
    *,
    threads: int,
    watch: Watch | None = None,
    stall_monitor: "StallMonitor | None" = None,
) -> dict[str, Any]:
    """Run a stage to its end; return its figures.

    Args:
        stage: its folder has been begun.
        argv: the command.
        threads: for each process of the child.
        watch: called with each new row of the stage's metrics.jsonl.
        stall_monitor: how long its ranks may stand still; for ever where it is left out.

    Raises:
        StageError: the child ended without a result; the message is the child's own where it left one.
    """
    return run_together([stage], argv, threads=threads, watch=watch, stall_monitor=stall_monitor)[0]


def run_together(
    stages: Sequence[Stage],
    argv: list[str],
    *,
    threads: int,
    place: int = 0,
    watch: Watch | None = None,
    stall_monitor: "StallMonitor | None" = None,
) -> list[dict[str, Any]]:
    """Run several stages in one child process, which ends each in its own folder; return their figures.

    `place` chooses the GPU of a process that works beside others of its kind.

    The child's output goes to the first one's log. Raises StageError for the first that has no result; the others' are kept.
    """
    with ExitStack() as locks:
        for stage in stages:
            locks.enter_context(_locked(stage.folder))
            _reap(stage.folder)
        log = locks.enter_context((stages[0].folder / LOG).open("ab"))
        with _started(argv, log, threads, place) as child:
            _follow(child, stages[0].folder, watch, stall_monitor)
    return [_outcome(stage, stages[0].folder / LOG, child.returncode) for stage in stages]


def result_of(stage: Stage, module: str, *, threads: int) -> dict[str, Any]:
    """Return the figures of a stage that is one process; run it first where it is not done."""
    return stage.result() or run_child(stage, python_argv(module, stage.begin()), threads=threads)


def run_beside(
    argv: list[str], log: IO[bytes], *, threads: int, on_cpu: bool, until: Callable[[], bool]
) -> int:
    """Run ranks that belong to another host's training; return their status. Once `until` holds they have a moment to end."""
    with _started(argv, log, threads, on_cpu=on_cpu) as child:
        while child.poll() is None and not until():
            time.sleep(POLL_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    return int(child.returncode)


def threads_each(processes: int) -> int:
    """Share this machine's cores among processes that work side by side."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def end_all() -> None:
    """End every child that any thread of this process waits for."""
    for child in list(_running):
        _end(child)


@contextmanager
def _started(
    argv: list[str], log: IO[bytes], threads: int, place: int = 0, *, on_cpu: bool = False
) -> "Iterator[subprocess.Popen[bytes]]":
    """Start a child for the length of a block, after which neither it nor anything it started is there."""
    child = subprocess.Popen(
        argv,
        env=_environment(threads, place) | (WITHOUT_GPUS if on_cpu else {}),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the child in order
        preexec_fn=die_with_parent,  # one system call, no lock is taken
    )
    _running.add(child)
    try:
        yield child
    finally:
        _end(child)
        _running.discard(child)


def _outcome(stage: Stage, log: Path, status: int) -> dict[str, Any]:
    error, figures = recorded_error(stage.folder), read_result(stage.folder, stage.expects)
    if error is not None:
        raise error
    if figures is not None:
        return figures
    if shutil.disk_usage(stage.folder).free < ROOM_BYTES:
        raise StageError(no_space(stage.folder))
    if -status in ENDING:
        raise StageError(
            f"stage {stage.kind} {stage.label} was ended by {signal.Signals(-status).name}, from outside or for want of memory; run again: "
            "what is finished is kept, and a training goes on from its last checkpoint",
            kind=EndedError.__name__,
        )
    lines = log.read_text(errors="replace").splitlines()
    raise StageError(
        f"stage {stage.kind} {stage.label} ended with status {status}; {log} ends: {' | '.join(lines[-3:])}"
    )


def _follow(
    child: "subprocess.Popen[bytes]",
    folder: Path,
    watch: Watch | None,
    stall_monitor: "StallMonitor | None",
) -> None:
    """Wait for the child while passing on what it writes to metrics.jsonl, and no longer than its ranks may stand still."""
    rows, stalls = _rows_as_they_come(folder / "metrics.jsonl"), Stalls(folder)
    clear(folder)
    while True:
        ended = child.poll() is not None
        if stall_monitor is not None:
            stall_monitor.check(stalls)
        for row in rows:
            if row is None:
                break
            if watch is not None:
                watch(row)
        if ended:
            return
        time.sleep(POLL_SECONDS)


def _rows_as_they_come(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield each complete row once, and None whenever there is no new one."""
    step = 0
    while True:
        rows = _complete_rows(path)
        for row in rows:
            if row["step"] > step:
                step = row["step"]
                yield row
        yield None


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _environment(threads: int, place: int = 0) -> dict[str, str]:
    """Return the child's environment: its parent, its threads, and the interpreter's tools (ninja) on the path."""
    tools = str(Path(sys.executable).parent)
    return {
        **os.environ,
        PARENT: str(os.getpid()),
        PLACE: str(place),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # the child works where the user does, and a file there must not pass for a library
        "PYTHONPATH": os.pathsep.join(
            [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the stage's lock; the kernel lets go of it when this process ends."""
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageError(
                f"another run is at work in {folder}; wait for it, then run again: what it finished is found"
            ) from error
        yield


def _reap(folder: Path) -> None:
    """End what a former run left at work in this folder, such as ranks whose launcher was killed."""
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in (process.info["cmdline"] or [])
    ]
    kill([process for process in left if process.pid != os.getpid()])


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the child and all it started: first in order, then by force. Ranks live in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(child.pid).children(recursive=True)
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
        kill(descendants)
    if child.poll() is None:
        child.kill()
        child.wait()


def kill(processes: list[psutil.Process]) -> None:
    """End processes by force, and wait until they are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)
