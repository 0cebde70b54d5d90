"""The frame of a stage that runs in a process of its own: read the inputs, do the work, leave a result or an error.

A child dies with its parent: no process of a run outlives the run.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_core.errors import LoraError
from pipelines.errors import PipelineError, StageError, no_space, record_error
from pipelines.runtime.stage import read_inputs, read_result, write_result

PR_SET_PDEATHSIG = 1
PARENT = "LORA_RUN_PID"
"""Environment variable with the process id of the run that started a stage."""
PLACE = "LORA_PLACE"
"""Environment variable with the place of a stage among those that work beside it, by which it takes a GPU."""
USER_ERROR = 2
"""Exit status of a stage that was refused for a reason the user can mend."""

Work = Callable[[Path, dict[str, Any], dict[str, str]], tuple[dict[str, Any], list[str]]]


def run_stage(work: Work) -> None:
    """Run `work` on the stage folder named on the command line; its figures and files become the result.

    Exits with 2 and one sentence when the inputs cannot be honoured.
    """
    die_with_parent()
    folder = Path(sys.argv[1])
    started = time.perf_counter()
    with errors_recorded(folder):
        figures, files = work(folder, *read_inputs(folder))
        write_result(folder, {**figures, "seconds": round(time.perf_counter() - started, 2)}, files)


def run_stages(work: Work) -> None:
    """Run `work` on each stage folder named on the command line, in order; each gets its own result or its own error.

    A stage that is done is passed over, so an interrupted batch loses the one at work. One that is refused for a reason
    the user can mend leaves the others to be done, and the exit status is 2. Any other error is left in its stage's folder
    as well and ends the batch with its traceback.
    """
    die_with_parent()
    refused = [not _attempted(work, Path(name)) for name in sys.argv[1:]]
    if any(refused):
        sys.exit(USER_ERROR)


def _attempted(work: Work, folder: Path) -> bool:
    """Do one stage of several; tell whether it has a result."""
    if read_result(folder) is not None:
        return True
    started = time.perf_counter()
    try:
        with errors_recorded(folder):
            figures, files = work(folder, *read_inputs(folder))
            write_result(
                folder, {**figures, "seconds": round(time.perf_counter() - started, 2)}, files
            )
    except SystemExit:  # refused, and said so
        return False
    return True


class errors_recorded:
    """Turn an error the user can mend into error.json, one sentence on stderr and exit status 2.

    Any other error is left there in one line as well, with the rank that it ended; its traceback goes to the log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, OSError) and error.errno == 28:  # ENOSPC
            error = PipelineError(no_space(self.folder))
        if isinstance(error, (PipelineError, LoraError)):
            with suppress(
                OSError
            ):  # a full disk has no room for it; the parent sees that by itself
                record_error(self.folder, error)
            print(f"error: {error}", file=sys.stderr)
            sys.exit(USER_ERROR)
        if isinstance(error, Exception):
            with suppress(OSError):
                record_error(
                    self.folder,
                    StageError(
                        f"{self.folder} failed{_on_rank()} with {_one_line(error)}; its log holds the rest"
                    ),
                )


def _on_rank() -> str:
    """Name the rank of several that this process is."""
    return f" on rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _one_line(error: Exception) -> str:
    """Return an error's kind and the first line of its text."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel (Linux) to end this process, by a signal, when its parent ends, however the parent ends.

    The run that started the stage is looked for by its process id as well: it may have ended before the kernel was asked.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
    run = os.environ.get(PARENT)
    if run is not None and not Path(f"/proc/{run}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
