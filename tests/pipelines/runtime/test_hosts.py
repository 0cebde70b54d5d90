"""A host joins each training of another host once, and ignores the call of a dead host."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_core.files import write_json
from pipelines.config.recipe import parse_recipe
from pipelines.config.sections import LaunchSection
from pipelines.errors import PipelineError, RecipeError
from pipelines.runtime import hosts
from pipelines.runtime.hosts import (
    CALL,
    Call,
    JoiningHost,
    calling_hosts,
    host_arguments,
    open_calls,
)
from pipelines.runtime.launcher import SINGLE_HOST

TWO_HOSTS = LaunchSection(config="cpu_zero2", processes=2, machines=2)
OLD_CALL = Call(attempt="old", config="cpu_zero2", processes=2, machines=2, count=7)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_MAIN_ADDRESS", "node-a:29500")
    for name in ("POLL_SECONDS", "COUNT_SECONDS"):
        monkeypatch.setattr(hosts, name, 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of a training."""
    path = tmp_path / "train" / "rank-4-abc"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve a joining host; return its machine rank once for each training that it joined."""
    joined: list[str] = []

    @contextmanager
    def hold(ranks: int) -> Iterator[None]:
        held.append(ranks)
        yield
        held.pop()

    held: list[int] = []
    host = JoiningHost(1, tmp_path, lambda _: None, hold)

    def run_joined_ranks(
        argv: list[str], log: object, *, threads: int, on_cpu: bool, until: Callable[[], bool]
    ) -> int:
        assert on_cpu  # as the call's config requires
        assert held == [1]  # of the two ranks, one is on this host
        joined.append(argv[argv.index("--machine_rank") + 1])
        while not until():
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(hosts.launcher, "run_joined_ranks", run_joined_ranks)
    is_over = threading.Event()
    thread = threading.Thread(target=host.serve, args=(is_over.is_set,), daemon=True)
    thread.start()
    yield joined
    is_over.set()
    thread.join(5)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_a_single_host_calls_no_other(folder: Path) -> None:
    with calling_hosts(LaunchSection(), folder) as arguments:
        assert arguments == SINGLE_HOST
        assert not (folder / CALL).exists()


def test_a_call_exists_as_long_as_the_training(folder: Path, tmp_path: Path) -> None:
    expected = ["--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "node-a"]
    with calling_hosts(TWO_HOSTS, folder) as arguments:
        assert arguments[:6] == expected
        wait_for(lambda: bool(open_calls(tmp_path)))
        assert open_calls(tmp_path)[0][0] == folder
    assert open_calls(tmp_path) == []


def test_each_training_is_joined_once(folder: Path, joined: list[str]) -> None:
    for number in (1, 2):
        with calling_hosts(TWO_HOSTS, folder):
            wait_for(lambda: len(joined) == number)  # noqa: B023
            threading.Event().wait(0.05)
        assert joined == ["1"] * number


def test_a_call_that_does_not_count_is_ignored(folder: Path, joined: list[str]) -> None:
    write_json(folder / CALL, OLD_CALL.plain())
    threading.Event().wait(0.2)
    assert joined == []
    with calling_hosts(TWO_HOSTS, folder):
        wait_for(lambda: joined == ["1"])


@pytest.mark.parametrize("address", ["", "node-a", "node-a:port", ":29500"])
def test_an_address_without_host_or_port_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_MAIN_ADDRESS", address)
    with pytest.raises(
        PipelineError, match=r"set it on each of the 2 hosts .* such as node-a:29500"
    ):
        host_arguments(OLD_CALL, 1)


def test_machines_need_the_same_number_of_ranks(
    recipe_with: Callable[..., dict[str, object]],
) -> None:
    with pytest.raises(
        RecipeError, match="has 3 processes on 2 machines; give each machine the same number"
    ):
        parse_recipe(recipe_with(launch={"config": "cpu_zero2", "processes": 3, "machines": 2}))
