"""A command judges an answer by its status, in a folder of its own, in time, and leaves nothing behind."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.errors import RecipeError
from pipelines.evaluation.execution import Verdict, command, execute

ANSWER = {"prompt": "1 + 1 = 'µ", "answer": "2", "reference": "2"}


def judged(
    tmp_path: Path, code: str, *answers: dict[str, str], seconds: float = 20
) -> list[Verdict]:
    (tmp_path / "check.py").write_text(code)
    return execute(command([sys.executable, "check.py"], [tmp_path]), answers or [ANSWER], seconds)


def test_the_status_says_whether_an_answer_is_right(tmp_path: Path) -> None:
    code = "import json, sys; read = json.load(sys.stdin); sys.exit(read['answer'] != read['reference'])"
    answers = [{**ANSWER, "answer": text} for text in ("2", "3", "2", "")]
    assert judged(tmp_path, code, *answers) == [100, 0, 100, 0]


def test_the_command_reads_all_of_an_answer(tmp_path: Path) -> None:
    code = f"import json, sys, pathlib; pathlib.Path({str(tmp_path / 'read')!r}).write_bytes(sys.stdin.buffer.read())"
    assert judged(tmp_path, code) == [100]
    assert json.loads((tmp_path / "read").read_text()) == ANSWER


def test_a_command_that_does_not_read_is_judged_by_its_status(tmp_path: Path) -> None:
    assert judged(tmp_path, "pass", {**ANSWER, "prompt": "x" * 1_000_000}) == [100]


def test_each_answer_has_an_empty_folder_that_goes_with_it(tmp_path: Path) -> None:
    code = (
        f"import os, pathlib; here = pathlib.Path.cwd(); assert not os.listdir(here); (here / 'file').touch()\n"
        f"log = pathlib.Path({str(tmp_path)!r}) / str(os.getpid()); log.write_text(str(here))"
    )
    assert judged(tmp_path, code, ANSWER, ANSWER) == [100, 100]
    folders = {Path(log.read_text()) for log in tmp_path.iterdir() if log.name != "check.py"}
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("import sys; print('wrong', file=sys.stderr); sys.exit(1)", 0),
        (
            "import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)",
            "ended with status 3: two",
        ),
        ("import sys; sys.exit(2)", "ended with status 2"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "was ended by signal 15"),
        (
            "import no_module_of_this_name",
            "ended with status 1: ModuleNotFoundError: No module named 'no_module_of_this_name'",
        ),
        ("raise ValueError('one\\ntwo')", "ended with status 1: two"),
        ("def (", "ended with status 1: SyntaxError: invalid syntax"),
        (
            "try: 1 / 0\nexcept ZeroDivisionError as error: raise KeyError('x') from error",
            "ended with status 1: KeyError: 'x'",
        ),
        (
            "import sys; print('x' * 500, file=sys.stderr); sys.exit(4)",
            "ended with status 4: " + "x" * 200,
        ),
        (
            "import sys; print('x' * 100_000 + '\\nlast', file=sys.stderr); sys.exit(4)",
            "ended with status 4: last",
        ),
    ],
)
def test_a_command_that_fails_is_an_error_and_no_wrong_answer(
    tmp_path: Path, code: str, verdict: Verdict
) -> None:
    assert judged(tmp_path, code) == [verdict]


def test_a_traceback_that_the_command_goes_on_after_is_the_answers(tmp_path: Path) -> None:
    """As the standard library's own test runner does it, which prints every failed test to standard error."""
    code = "import unittest\nclass Test(unittest.TestCase):\n    def test(self): self.assertEqual(1, 2)\nunittest.main()"
    assert judged(tmp_path, code) == [0]


def test_what_does_not_end_in_time_is_an_error_and_ended_with_all_it_started(
    tmp_path: Path,
) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(300)"
    )
    begun = time.monotonic()
    assert judged(tmp_path, code, seconds=3) == ["took longer than 3 s"]
    assert time.monotonic() - begun < 60
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while (
        is_at_work(pid) and time.monotonic() < deadline
    ):  # a process that was killed takes a moment to be gone
        time.sleep(0.05)
    assert not is_at_work(pid)


def is_at_work(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    code = "import sys; sys.exit(sys.argv[1:] != ['$HOME; exit 1', '*'])"
    (tmp_path / "check.py").write_text(code)
    assert execute(
        command([sys.executable, "check.py", "$HOME; exit 1", "*"], [tmp_path]), [ANSWER], 20
    ) == [100]


def test_the_files_that_a_command_names_are_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "check.py").touch()
    assert command(["python3", "check.py", "other"], [tmp_path])[1:] == [
        str(tmp_path / "check.py"),
        "other",
    ]


@pytest.mark.parametrize("word", ["check.py", "check.SH", "checks/one", "/no/such/file"])
def test_a_file_that_a_command_names_and_that_is_not_there_is_refused(
    tmp_path: Path, word: str
) -> None:
    with pytest.raises(
        RecipeError,
        match=f"evaluation.execute names '{word}', which is not in {tmp_path}; put it there",
    ):
        command(["python3", word], [tmp_path])


@pytest.mark.parametrize(
    "word",
    [
        "-c",
        "--out=a/b",
        "import a.b; a/b",
        "http://localhost:8000/judge",
        "3.5",
        "package.module",
        "",
    ],
)
def test_what_is_no_path_is_left_as_it_is(tmp_path: Path, word: str) -> None:
    assert command(["python3", word], [tmp_path])[1:] == [word]


def test_a_program_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.txt").touch()
    for word in ("no-program-of-this-name", "data.txt"):
        with pytest.raises(
            RecipeError,
            match=f"evaluation.execute names the program '{word}', which is neither on the path nor in",
        ):
            command([word], [tmp_path])


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "check").write_bytes(b"\x00\x01 no program")
    (tmp_path / "check").chmod(0o755)
    with pytest.raises(RecipeError, match="cannot be started"):
        execute(command(["check"], [tmp_path]), [ANSWER], 5)
