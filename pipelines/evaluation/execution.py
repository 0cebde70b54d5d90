"""Judge an answer by running it: a command of the user's own reads the answer and says by its status whether it is right.

    status 0           the answer is right: 100
    status 1           it is wrong: 0; but where standard error ends in a Python traceback, the command has failed
    any other status,
    a signal, no end   the command has failed, and the answer has an error in place of a value

So a command that is broken itself is no wrong answer. One written in Python catches what an answer raises, and exits with 1.

No shell is asked. The command reads one JSON object (prompt, answer, reference) from its standard input, in an empty
folder of its own that goes with it, and is ended with all it started when its time is over. What it prints is dropped, but
for the last line of standard error where it fails.
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
"""Endings of files that a program is given to run."""
READ_OF_ERRORS = 65536
"""Bytes from the end of standard error that are looked at."""
LONGEST_LINE = 200
"""Characters of its last line that are kept."""
TRACEBACK = re.compile(
    r'^.*Traceback \(most recent call last\):$|\A  File ".*", line \d+$', re.MULTILINE
)
"""Opens what Python prints when it fails; where a file is no Python at all there is no heading."""
Verdict = float | str
"""100 or 0; or in words why the command says neither."""


def command(words: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the command with the files that it names made absolute, as it runs elsewhere.

    Raises:
        RecipeError: there is no such program, or a word that reads like a file's path names none.
    """
    first, *rest = words
    program = shutil.which(first) or _file(first, folders)
    if program is None or not os.access(program, os.X_OK):
        raise RecipeError(
            f"evaluation.execute names the program {first!r}, which is neither on the path nor in {listed(folders)}"
        )
    for word in rest:
        if _reads_like_a_file(word) and find(word, folders) is None:
            raise RecipeError(
                f"evaluation.execute names {word!r}, which is not in {listed(folders)}; put it there, "
                "or if it is no file of this machine put the command into a script of its own"
            )
    return [str(Path(program).absolute()), *(_file(word, folders) or word for word in rest)]


def execute(
    argv: Sequence[str], answers: Sequence[dict[str, str]], seconds: float
) -> list[Verdict]:
    """Return what the command says of each answer.

    Args:
        argv: the command, see `command`.
        answers: what each run of it reads.
        seconds: longest time of a run.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda one: _run(argv, one, seconds), answers))


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


def _verdict(status: int, said: str) -> Verdict:
    """Judge by the status, and by the end of standard error where that alone does not tell."""
    if status == 0:
        return RIGHT
    if status == 1 and not _ends_in_a_traceback(said):
        return WRONG
    how = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
    last = said.rstrip().rpartition("\n")[2].strip()[:LONGEST_LINE]
    return f"{how}: {last}" if last else how


def _ends_in_a_traceback(said: str) -> bool:
    """Tell whether nothing follows the last traceback; what a program prints after one stands behind an empty line."""
    found = list(TRACEBACK.finditer(said))
    return bool(found) and "\n\n" not in said[found[-1].start() :].rstrip()


def _end_of(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - READ_OF_ERRORS))
    return errors.read().decode(errors="replace")


def _started(argv: Sequence[str], folder: str, errors: IO[bytes]) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            argv,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # what it starts is ended with it
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise RecipeError(
            f"evaluation.execute {' '.join(argv)!r} cannot be started ({error}); name a program"
        ) from error


def _reads_like_a_file(word: str) -> bool:
    """Tell whether a word is a path; options, addresses and text with blanks in it are none."""
    if word.startswith("-") or "://" in word or any(map(str.isspace, word)):
        return False
    return "/" in word or word.lower().endswith(SCRIPTS)


def _file(word: str, folders: Sequence[Path]) -> str | None:
    path = find(word, folders) if word else None
    return str(path.absolute()) if path is not None and path.is_file() else None
