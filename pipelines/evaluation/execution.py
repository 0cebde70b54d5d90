"""Judge an answer by running it: a command of the user's own reads the answer and says by its status whether it is right.

No shell is asked. The command reads one JSON object (prompt, answer, reference) from its standard input, in an empty
folder of its own that goes with it, and is ended with all it started when its time is over. What it prints is dropped.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.child import die_with_parent
from pipelines.errors import RecipeError
from pipelines.lookup import find, listed

RIGHT, WRONG = 100.0, 0.0


def command(words: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the command with the files that it names made absolute, as it runs elsewhere.

    Raises:
        RecipeError: there is no such program.
    """
    first, *rest = words
    program = shutil.which(first) or _file(first, folders)
    if program is None or not os.access(program, os.X_OK):
        raise RecipeError(f"evaluation.execute names the program {first!r}, which is neither on the path nor in {listed(folders)}")
    return [str(Path(program).absolute()), *(_file(word, folders) or word for word in rest)]


def execute(argv: Sequence[str], answers: Sequence[dict[str, str]], seconds: float) -> list[float]:
    """Return for each answer 100 where the command ends with status 0, and 0 where it does not, or not in time.

    Args:
        argv: the command, see `command`.
        answers: what each run of it reads.
        seconds: longest time of a run.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda one: _run(argv, one, seconds), answers))


def _run(argv: Sequence[str], answer: dict[str, Any], seconds: float) -> float:
    with TemporaryDirectory(prefix="answer-", ignore_cleanup_errors=True) as folder:
        child = _started(argv, folder)
        with suppress(subprocess.TimeoutExpired):
            child.communicate(json.dumps(answer, ensure_ascii=False).encode(), timeout=seconds)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return RIGHT if child.wait() == 0 else WRONG


def _started(argv: Sequence[str], folder: str) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            argv,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what it starts is ended with it
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise RecipeError(f"evaluation.execute {' '.join(argv)!r} cannot be started ({error}); name a program") from error


def _file(word: str, folders: Sequence[Path]) -> str | None:
    path = find(word, folders) if word else None
    return str(path.absolute()) if path is not None and path.is_file() else None
