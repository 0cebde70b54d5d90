"""The child process of a stage: read the inputs, do the work, write a result or an error.

A child ends with its parent: no process of a run outlives the run.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path

from lora_core.errors import LoraError
from pipelines.errors import (
    PipelineError,
    StageError,
    no_space,
    one_line,
    record_error,
    without_credentials,
)
from pipelines.runtime.interfaces.inputs import StagePaths
from pipelines.runtime.interfaces.kinds import Inputs, Result, StageKind
from pipelines.runtime.stage import read_inputs, read_result, write_result

PR_SET_PDEATHSIG = 1
PARENT = "LORA_RUN_PID"
"""Environment variable with the process id of the run that started a stage."""
WORKER_INDEX = "LORA_PLACE"
"""Environment variable with the index of a stage among those that run at the same time; it selects
the GPU."""
USER_ERROR = 2
"""Exit status of a stage that failed for a reason that the user can fix."""

Work = Callable[[Path, Inputs, StagePaths], tuple[Result, list[str]]]
"""Folder, inputs, paths → what the stage reports, and the files that it wrote for later stages."""


def execute_stage(kind: StageKind[Inputs, Result], work: Work[Inputs, Result]) -> None:
    """Run `work` on the stage folder named on the command line, and write its result.

    If the inputs are invalid, print one sentence and exit with status 2.

    Args:
        kind: of the stage, with the types of its inputs and result.
        work: does the work of one stage.
    """
    die_with_parent()
    _execute(kind, work, Path(sys.argv[1]))


def execute_stages(kind: StageKind[Inputs, Result], work: Work[Inputs, Result]) -> None:
    """Run `work` on each stage folder named on the command line; each gets a result or an error.

    A finished stage is skipped, so an interrupted batch loses only the running stage. After an
    error that the user can fix, the batch continues, and the exit status is 2. Any other error is
    recorded in its stage's folder as well, and ends the batch with a traceback.

    Args:
        kind: of the stages, with the types of their inputs and results.
        work: does the work of one stage; may keep what the next one shares.
    """
    die_with_parent()
    failed = False
    for name in sys.argv[1:]:
        folder = Path(name)
        if read_result(folder, kind) is not None:
            continue
        try:
            _execute(kind, work, folder)
        except SystemExit:  # errors_recorded has printed the reason
            failed = True
    if failed:
        sys.exit(USER_ERROR)


def _execute(kind: StageKind[Inputs, Result], work: Work[Inputs, Result], folder: Path) -> None:
    """Run one stage and write its result or its error."""
    started = time.perf_counter()
    with errors_recorded(folder):
        result, files = work(folder, *read_inputs(folder, kind))
        seconds = round(time.perf_counter() - started, 2)
        write_result(folder, result.model_copy(update={"seconds": seconds}), files)


class errors_recorded:
    """Turn a user error into error.json, one sentence on stderr and exit status 2.

    Any other error is recorded there in one line as well, with its rank; the traceback goes to the
    log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, OSError) and error.errno == ENOSPC:
            error = PipelineError(no_space(self.folder))
        if isinstance(error, (PipelineError, LoraError)):
            self._record(error)
            print(f"error: {without_credentials(str(error))}", file=sys.stderr)
            sys.exit(USER_ERROR)
        if isinstance(error, Exception):
            failure = f"{self.folder} failed{_on_rank()} with {one_line(error)}"
            self._record(StageError(f"{failure}; its log has the details"))

    def _record(self, error: Exception) -> None:
        with suppress(OSError):  # the disk may be full; the parent detects that itself
            record_error(self.folder, error)


def _on_rank() -> str:
    """Return " on rank R" if this process is one of several ranks, else nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return ""
    return f" on rank {os.environ['RANK']}"


def die_with_parent(by: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the Linux kernel send this process a signal when its parent ends for any reason.

    The parent, and the run which started the stage, may have ended before this call; then this
    process ends at once.

    Args:
        by: the signal.
        parent: process id of the parent, as far as it is known.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
    run = os.environ.get(PARENT)
    is_orphan = parent is not None and os.getppid() != parent
    if is_orphan or (run is not None and not Path(f"/proc/{run}").exists()):
        os.kill(os.getpid(), signal.SIGKILL)
