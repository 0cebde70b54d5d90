"""A command scores an answer by its exit status; a broken one never counts as a wrong answer."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.errors import RecipeError
from pipelines.evaluation.execution import Verdict, command, execute

ANSWER = {"prompt": "1 + 1 = 'µ", "answer": "2", "reference": "2"}


def verdicts(
    tmp_path: Path, code: str, *answers: dict[str, str], seconds: float = 20
) -> list[Verdict]:
    (tmp_path / "check.py").write_text(code)
    return execute(command([sys.executable, "check.py"], [tmp_path]), answers or [ANSWER], seconds)


def test_the_exit_status_reports_whether_an_answer_is_right(tmp_path: Path) -> None:
    code = (
        "import json, sys; read = json.load(sys.stdin); "
        "sys.exit(read['answer'] != read['reference'])"
    )
    answers = [{**ANSWER, "answer": text} for text in ("2", "3", "2", "")]
    assert verdicts(tmp_path, code, *answers) == [100, 0, 100, 0]


def test_the_command_reads_the_complete_answer(tmp_path: Path) -> None:
    file = str(tmp_path / "read")
    code = f"import sys, pathlib; pathlib.Path({file!r}).write_bytes(sys.stdin.buffer.read())"
    assert verdicts(tmp_path, code) == [100]
    assert json.loads((tmp_path / "read").read_text()) == ANSWER


def test_a_command_that_does_not_read_still_scores_by_its_status(tmp_path: Path) -> None:
    assert verdicts(tmp_path, "pass", {**ANSWER, "prompt": "x" * 1_000_000}) == [100]


def test_each_answer_has_an_empty_temporary_folder(tmp_path: Path) -> None:
    code = (
        "import os, pathlib; here = pathlib.Path.cwd(); assert not os.listdir(here)\n"
        "(here / 'file').touch()\n"
        f"log = pathlib.Path({str(tmp_path)!r}) / str(os.getpid()); log.write_text(str(here))"
    )
    assert verdicts(tmp_path, code, ANSWER, ANSWER) == [100, 100]
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
def test_a_command_that_fails_is_an_error_and_not_a_wrong_answer(
    tmp_path: Path, code: str, verdict: Verdict
) -> None:
    assert verdicts(tmp_path, code) == [verdict]


def test_a_traceback_before_more_output_belongs_to_the_answer(tmp_path: Path) -> None:
    """The standard library's test runner prints every failed test to standard error."""
    code = (
        "import unittest\n"
        "class Test(unittest.TestCase):\n"
        "    def test(self): self.assertEqual(1, 2)\n"
        "unittest.main()"
    )
    assert verdicts(tmp_path, code) == [0]


def test_a_timeout_is_an_error_and_kills_all_child_processes(
    tmp_path: Path,
) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(300)"
    )
    started = time.monotonic()
    assert verdicts(tmp_path, code, seconds=3) == ["took longer than 3 s"]
    assert time.monotonic() - started < 60
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:  # a killed process ends with a delay
        time.sleep(0.05)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_command_runs_without_a_shell(tmp_path: Path) -> None:
    code = "import sys; sys.exit(sys.argv[1:] != ['$HOME; exit 1', '*'])"
    (tmp_path / "check.py").write_text(code)
    argv = command([sys.executable, "check.py", "$HOME; exit 1", "*"], [tmp_path])
    assert execute(argv, [ANSWER], 20) == [100]


def test_the_files_of_a_command_are_found_next_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "check.py").touch()
    argv = command(["python3", "check.py", "other"], [tmp_path])
    assert argv[1:] == [str(tmp_path / "check.py"), "other"]


@pytest.mark.parametrize("word", ["check.py", "check.SH", "checks/one", "/no/such/file"])
def test_a_missing_file_of_a_command_is_refused(tmp_path: Path, word: str) -> None:
    message = f"evaluation.execute names '{word}', which is not in {tmp_path}; put it there"
    with pytest.raises(RecipeError, match=message):
        command(["python3", word], [tmp_path])


@pytest.mark.parametrize(
    "word",
    [
        "-c",
        "--out=a/b",
        "import a.b; a/b",
        "http://localhost:8000/score",
        "3.5",
        "package.module",
        "",
    ],
)
def test_a_word_that_is_not_a_path_is_unchanged(tmp_path: Path, word: str) -> None:
    assert command(["python3", word], [tmp_path])[1:] == [word]


def test_a_missing_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.txt").touch()
    for word in ("no-program-of-this-name", "data.txt"):
        message = f"the program '{word}', which is neither on the path nor in"
        with pytest.raises(RecipeError, match=message):
            command([word], [tmp_path])


def test_a_file_that_is_not_a_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "check").write_bytes(b"\x00\x01 not a program")
    (tmp_path / "check").chmod(0o755)
    with pytest.raises(RecipeError, match="cannot be started"):
        execute(command(["check"], [tmp_path]), [ANSWER], 5)
