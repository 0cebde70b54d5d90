"""What an earlier run left running is killed, and a process that got its id later is not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.runtime import fork_server
from pipelines.runtime.processes import SESSION, kill_leftovers, record_session


@pytest.fixture
def leader() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process with the command of a forked one, in a session of its own."""
    waiting = [sys.executable, "-c", "import time; time.sleep(600)", fork_server.__name__]
    with subprocess.Popen(waiting, start_new_session=True) as process:
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
