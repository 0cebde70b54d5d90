"""Score an answer by running it: a user-defined command reads the answer and reports by its status.

    status 0           the answer is right: 100
    status 1           it is wrong: 0; but if standard error ends in a Python traceback, the command
                       has failed
    any other status,  the command has failed, and the answer has an error instead of a value
    a signal, a timeout

A command that is broken itself therefore never counts as a wrong answer. A command in Python must
catch what an answer raises, and exit with 1.

The command runs without a shell. It reads one JSON object (prompt, answer, reference) from its
standard input, in an empty temporary folder. When its time is over, it is killed with all processes
that it started. Its output is dropped, except for the last line of standard error if it fails.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

from pipelines.errors import RecipeError
from pipelines.paths import find, listed
from pipelines.runtime.child import die_with_parent

RIGHT, WRONG = 100.0, 0.0
SCRIPTS = (".py", ".sh", ".bash", ".pl", ".rb", ".js", ".mjs", ".ts", ".lua", ".r", ".jl", ".jar")
"""Extensions of files that a program is given to run."""
STDERR_BYTES = 65536
"""Bytes from the end of standard error that are read."""
STDERR_CHARACTERS = 200
"""Characters of its last line that are kept."""
TRACEBACK = re.compile(
    r'^.*Traceback \(most recent call last\):$|\A  File ".*", line \d+$', re.MULTILINE
)
"""The first line that Python prints when it fails; a syntax error in the file has no heading."""
Verdict = float | str
"""100 or 0; or the reason why the command failed."""


def command(words: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the command with absolute paths of its files, as it runs in another folder.

    Args:
        words: evaluation.execute of the recipe.
        folders: searched for the program and for files among the words.

    Raises:
        RecipeError: there is no such program, or a word that looks like a path is not a file.
    """
    first, *rest = words
    program = shutil.which(first) or _file(first, folders)
    if program is None or not os.access(program, os.X_OK):
        raise RecipeError(
            f"evaluation.execute names the program {first!r}, "
            f"which is neither on the path nor in {listed(folders)}"
        )
    for word in rest:
        if _looks_like_a_file(word) and find(word, folders) is None:
            raise RecipeError(
                f"evaluation.execute names {word!r}, which is not in {listed(folders)}; put it "
                "there, or if it is not a file of this machine move the command into a script"
            )
    return [str(Path(program).absolute()), *(_file(word, folders) or word for word in rest)]


def execute(
    argv: Sequence[str], answers: Sequence[dict[str, str]], seconds: float
) -> list[Verdict]:
    """Return the verdict of the command on each answer.

    Args:
        argv: the command, see `command`.
        answers: the JSON object that each run of it reads.
        seconds: maximum duration of a run.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda answer: _run(argv, answer, seconds), answers))


def _run(argv: Sequence[str], answer: dict[str, Any], seconds: float) -> Verdict:
    with (
        TemporaryDirectory(prefix="answer-", ignore_cleanup_errors=True) as folder,
        TemporaryFile() as errors,
    ):
        child = _started(argv, folder, errors)
        try:
            child.communicate(json.dumps(answer, ensure_ascii=False).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"took longer than {seconds:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return _verdict(child.returncode, _end_of(errors))


def _verdict(status: int, stderr: str) -> Verdict:
    """Decide by the status, and by the end of standard error if the status is ambiguous."""
    if status == 0:
        return RIGHT
    if status == 1 and not _ends_in_a_traceback(stderr):
        return WRONG
    end = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
    last_line = stderr.rstrip().rpartition("\n")[2].strip()[:STDERR_CHARACTERS]
    return f"{end}: {last_line}" if last_line else end


def _ends_in_a_traceback(stderr: str) -> bool:
    """Return whether nothing follows the last traceback.

    Output of a program after a traceback comes after an empty line.
    """
    matches = list(TRACEBACK.finditer(stderr))
    if not matches:
        return False
    return "\n\n" not in stderr[matches[-1].start() :].rstrip()


def _end_of(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - STDERR_BYTES))
    return errors.read().decode(errors="replace")


def _started(argv: Sequence[str], folder: str, errors: IO[bytes]) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            argv,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # so that its children can be killed with it
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise RecipeError(
            f"evaluation.execute {' '.join(argv)!r} cannot be started ({error}); name a program"
        ) from error


def _looks_like_a_file(word: str) -> bool:
    """Return whether a word is a path; options, URLs and text with blanks in it are not."""
    if word.startswith("-") or "://" in word or any(map(str.isspace, word)):
        return False
    return "/" in word or word.lower().endswith(SCRIPTS)


def _file(word: str, folders: Sequence[Path]) -> str | None:
    path = find(word, folders) if word else None
    return str(path.absolute()) if path is not None and path.is_file() else None
