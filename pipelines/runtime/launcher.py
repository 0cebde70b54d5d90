"""Start a stage as a child process, follow it, and leave no process behind. Imports no torch.

Parent and child exchange files in the stage's folder; the child's output goes to log.txt there. The
folder is locked while the child runs, so a second run of the same recipe fails with an error
instead of interfering.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import yaml
from filelock import FileLock, Timeout

from pipelines.console import Watch
from pipelines.errors import (
    EndedError,
    PeerError,
    RecipeError,
    StageError,
    no_space,
    recorded_error,
)
from pipelines.runtime.child import PARENT, WORKER_INDEX, die_with_parent
from pipelines.runtime.forked_child import Child, ForkServer, ForkServerError, sees_gpu
from pipelines.runtime.interfaces.kinds import (
    KINDS,
    LOCAL_RANKS,
    QUANTIZATION,
    TRAIN,
    Inputs,
    Result,
)
from pipelines.runtime.monitor import POLL_SECONDS, StallMonitor, follow
from pipelines.runtime.processes import GRACE_SECONDS, end, kill_leftovers, record_session
from pipelines.runtime.stage import LOG, Stage, digest

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "infra" / "accelerate"
MIN_FREE_BYTES = 1 << 20
"""If the disk has less than this, a child without a result or an error had no room to write one."""
ENDING = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end a process from outside; the process itself is not at fault."""
RANK_ENDED = re.compile(r"^rank \d+ \(process \d+\) ended by SIG\w+$", re.MULTILINE)
"""Line in the log of a training, of the launcher that forked the ranks."""
WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment in which neither PyTorch nor DeepSpeed finds a GPU; ROCm's PyTorch respects it
too."""
SINGLE_HOST = ("--main_process_port", "0")
"""Arguments of accelerate's launcher if one host trains: any free port."""

ACCELERATE = "accelerate.commands.launch"
EXTENSIONS = "TORCH_EXTENSIONS_DIR"
"""PyTorch's variable for the folder of compiled operators."""

_running: set[Child] = set()
"""Running children of all threads: an interrupted run ends those that other threads wait for."""

_server = ForkServer([LOCAL_RANKS, *(kind.module for kind in KINDS.values() if kind is not TRAIN)])
"""Forks stages where no GPU is visible."""


def stage_argv(stages: Sequence[Stage[Inputs, Result]]) -> list[str]:
    """Return the command that runs stages of one kind in one process."""
    return [sys.executable, "-m", stages[0].kind.module, *(str(stage.folder) for stage in stages)]


def accelerate_argv(
    config: str, processes: int, folder: Path, host_arguments: Sequence[str] = SINGLE_HOST
) -> list[str]:
    """Return the command that trains on `processes` ranks with an accelerate config.

    Args:
        config: see `config_file`.
        processes: ranks on all hosts together.
        folder: folder of the stage.
        host_arguments: this host's rank among the hosts, as arguments of accelerate's launcher.
    """
    can_fork = host_arguments == SINGLE_HOST and not sees_gpu(os.environ)
    launch = [sys.executable, "-m", LOCAL_RANKS if can_fork else ACCELERATE]
    file = str(config_file(config))
    launch += ["--config_file", file, *_deepspeed_arguments(config)]
    launch += ["--num_processes", str(processes), *host_arguments]
    return [*launch, "-m", TRAIN.module, str(folder)]


def _deepspeed_arguments(config: str) -> list[str]:
    """Pass DeepSpeed's config as an absolute path; accelerate uses the working folder."""
    settings = yaml.safe_load(config_file(config).read_text())
    name = (settings.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if name is None or not (REPOSITORY / name).is_file():
        return []
    return ["--deepspeed_config_file", str(REPOSITORY / name)]


def config_file(name: str) -> Path:
    """Find an accelerate config by name in infra/accelerate, or by path.

    Raises:
        RecipeError: there is none.
    """
    for path in (CONFIGS / f"{name}.yaml", Path(name).expanduser()):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise RecipeError(
        f"launch.config {name!r} is neither a file nor a config of infra/accelerate: {known}"
    )


def ensure_result(stage: Stage[Inputs, Result], *, threads: int) -> Result:
    """Return the result of a single-process stage; run the stage first if it is not done.

    Args:
        stage: runs in one child process.
        threads: of that process.

    Raises:
        StageError: the stage failed; see `run_child`.
    """
    result = stage.result()
    if result is not None:
        return result
    stage.begin()
    return run_child([stage], stage_argv([stage]), threads=threads)[0]


def run_child(
    stages: Sequence[Stage[Inputs, Result]],
    argv: list[str],
    *,
    threads: int,
    worker_index: int = 0,
    watch: Watch | None = None,
    stall_monitor: StallMonitor | None = None,
) -> list[Result]:
    """Run one or several stages in one child process, each in its own folder; return their results.

    Args:
        stages: `begin` was called on each.
        argv: the command.
        threads: for each process of the child.
        worker_index: index of this child among those that run at the same time; it selects the GPU.
        watch: called with each new row of the first stage's metrics.jsonl.
        stall_monitor: limits how long its ranks may stall; without it a stall has no limit.

    Raises:
        StageError: a stage has no result; the message is the child's own if it wrote one. The
            results of the other stages are kept. The output of the child is in the log of the first
            stage.
    """
    with ExitStack() as locks:
        for stage in stages:
            locks.enter_context(_locked(stage.folder))
            kill_leftovers(stage.folder)
        log = locks.enter_context((stages[0].folder / LOG).open("ab"))
        environment = _environment(threads, worker_index)
        with _started(argv, log, environment, _libraries(stages)) as child:
            for stage in stages:
                record_session(stage.folder, child.pid)
            follow(child, stages[0].folder, watch=watch, stall_monitor=stall_monitor)
        status = child.wait()
    return [_outcome(stage, stages[0].folder / LOG, status) for stage in stages]


def run_joined_ranks(
    argv: list[str], log: IO[bytes], *, threads: int, on_cpu: bool, until: Callable[[], bool]
) -> int:
    """Run this host's ranks of another host's training; return their exit status.

    Once `until` returns True, the ranks have GRACE_SECONDS to end.

    Args:
        argv: the launcher's command.
        log: gets its output.
        threads: for each rank.
        on_cpu: hide GPUs from the ranks.
        until: returns whether the training is over on the first host.
    """
    environment = _environment(threads)
    if on_cpu:
        environment |= WITHOUT_GPUS
    with _started(argv, log, environment) as child:
        while child.poll() is None and not until():
            time.sleep(POLL_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    return child.wait()


def threads_each(processes: int) -> int:
    """Divide the cores among processes that run at the same time.

    These are the cores that this process may use, at most as many as OMP_NUM_THREADS says; of a
    list, which is for nested regions, its first number counts.
    """
    cores = len(os.sched_getaffinity(0))
    limit, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")
    if limit.isdigit():
        cores = min(cores, int(limit))
    return max(1, cores // processes)


def extensions_folder() -> Path:
    """Return where PyTorch compiles operators: a folder of this Python environment.

    Two environments would compile them again in turn in a common folder, and replace the file of an
    operator while a training of the other one uses it.
    """
    configured = os.environ.get(EXTENSIONS)
    if configured:
        return Path(configured)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions" / f"lora-{digest(sys.prefix)[:12]}"


def end_all() -> None:
    """End every child that any thread of this process waits for."""
    for child in list(_running):
        end(child)


@contextmanager
def _started(
    argv: list[str], log: IO[bytes], environment: dict[str, str], libraries: Sequence[str] = ()
) -> Iterator[Child]:
    """Start a child; at the end of the block, end it and everything that it started."""
    child = _start(argv, log, environment, libraries)
    _running.add(child)
    try:
        yield child
    finally:
        end(child)
        _running.discard(child)


def _start(
    argv: list[str], log: IO[bytes], environment: dict[str, str], libraries: Sequence[str]
) -> Child:
    """Fork the child from a process that has imported its libraries, or start it."""
    if _server.can_start(argv, environment):
        threads = int(environment["OMP_NUM_THREADS"])
        with suppress(ForkServerError):
            return _server.start(
                argv, environment=environment, threads=threads, log=log, imports=libraries
            )
    return subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches only the parent, which ends the child in order
        preexec_fn=die_with_parent,  # one system call, takes no lock
    )


def _libraries(stages: Sequence[Stage[Inputs, Result]]) -> list[str]:
    """Return what the stages import: their module, which ranks import too, and libraries."""
    kind = stages[0].kind
    quantizations = {getattr(stage.inputs, "quantization", "none") for stage in stages}
    return [kind.module, *kind.libraries, *(QUANTIZATION if "nf4" in quantizations else ())]


def _outcome(stage: Stage[Inputs, Result], log: Path, status: int) -> Result:
    error = recorded_error(stage.folder)
    if error is not None:
        raise _with_ended_rank(error, log)
    result = stage.result()
    if result is not None:
        return result
    if shutil.disk_usage(stage.folder).free < MIN_FREE_BYTES:
        raise StageError(no_space(stage.folder))
    name = f"stage {stage.kind} {stage.label}"
    if -status in ENDING:
        raise StageError(
            f"{name} was ended by {signal.Signals(-status).name}, from outside or because memory "
            "ran out; run again: finished stages are kept, and a training resumes from its last "
            "checkpoint",
            kind=EndedError.__name__,
        )
    lines = log.read_text(errors="replace").splitlines()
    raise StageError(f"{name} ended with status {status}; {log} ends: {' | '.join(lines[-3:])}")


def _with_ended_rank(error: StageError, log: Path) -> StageError:
    """Add to the error of a rank that lost another one how that one ended, if a signal ended it."""
    if error.kind != PeerError.__name__:
        return error
    ended = RANK_ENDED.findall(log.read_text(errors="replace"))
    return StageError(f"{error}; {ended[-1]}", error.kind) if ended else error


def _environment(threads: int, worker_index: int = 0) -> dict[str, str]:
    """Return the child's environment: parent, threads, and the interpreter's tools (ninja)."""
    tools = str(Path(sys.executable).parent)
    python_path = [str(REPOSITORY)]
    if os.environ.get("PYTHONPATH"):
        python_path.append(os.environ["PYTHONPATH"])
    return {
        **os.environ,
        PARENT: str(os.getpid()),
        WORKER_INDEX: str(worker_index),
        EXTENSIONS: str(extensions_folder()),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # The child works in the user's folder, where a file must not shadow a library.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(python_path),
        "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the stage's lock; the kernel releases it when this process ends."""
    try:
        held = FileLock(folder / "lock").acquire(blocking=False)
    except Timeout as error:
        raise StageError(
            f"another run is working in {folder}; wait for it, then run again: what it "
            "finishes is reused"
        ) from error
    with held:
        yield
