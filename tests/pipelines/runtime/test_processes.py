"""What an earlier run left running is killed, and a process that got its id later is not."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.runtime import fork_server
from pipelines.runtime.processes import SESSION, kill_leftovers, record_session


@pytest.fixture
def leader() -> Iterator[subprocess.Popen[bytes]]:
    with start_leader() as process:
        yield process
        process.kill()


def test_a_process_of_the_recorded_session_is_killed(
    leader: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    record_session(tmp_path, leader.pid)
    kill_leftovers(tmp_path)
    leader.wait(10)  # raises unless it has ended; its status went to who has waited first


@pytest.mark.parametrize("recorded", ["{pid} 1", "{pid}", "", "text"])
def test_a_process_with_the_id_of_an_earlier_one_is_not_killed(
    leader: subprocess.Popen[bytes], tmp_path: Path, recorded: str
) -> None:
    (tmp_path / SESSION).write_text(recorded.format(pid=leader.pid))
    kill_leftovers(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        leader.wait(0.5)


def test_a_process_with_a_reused_id_is_killed(tmp_path: Path) -> None:
    """psutil keeps the process that had the id before, and would refuse to kill another one."""
    first = start_leader()
    list(psutil.process_iter())
    first.kill()
    first.wait()
    second = start_leader_with(first.pid)
    if second is None:
        pytest.skip("this user cannot choose the id of the next process")
    with second:
        record_session(tmp_path, second.pid)
        kill_leftovers(tmp_path)
        second.wait(10)


def start_leader() -> "subprocess.Popen[bytes]":
    """Start a process with the command of a forked one, in a session of its own."""
    waiting = [sys.executable, "-c", "import time; time.sleep(600)", fork_server.__name__]
    process = subprocess.Popen(waiting, start_new_session=True)
    while not psutil.Process(process.pid).cmdline():  # for a moment after exec it has none
        time.sleep(0.01)
    return process


def start_leader_with(pid: int) -> "subprocess.Popen[bytes] | None":
    """Start a leader with this id; None if the kernel does not allow it."""
    for _ in range(50):  # another process may get the id first, and end soon
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError:
            return None
        started = start_leader()
        if started.pid == pid:
            return started
        started.kill()
        started.wait()
    return None
