"""A host joins each training that another begins once, and no call that a host which is gone has left behind."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_core.files import write_json
from pipelines.config.recipe import parse_recipe
from pipelines.config.sections import LaunchSection
from pipelines.errors import PipelineError, RecipeError
from pipelines.runtime import hosts
from pipelines.runtime.hosts import CALL, Joined, calling, calls, place_of
from pipelines.runtime.launcher import ALONE

TWO = LaunchSection(config="cpu_zero2", processes=2, machines=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_MAIN_ADDRESS", "node-a:29500")
    for name in ("POLL_SECONDS", "COUNT_SECONDS"):
        monkeypatch.setattr(hosts, name, 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A training's folder."""
    path = tmp_path / "train" / "rank-4-abc"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Joined, list[str]]]:
    """A host that has joined, and the trainings it took part in; each lasts until its call is over."""
    served = list[str]()
    host = Joined(1, tmp_path, lambda _: None)

    def run_beside(
        argv: list[str], log: object, *, threads: int, on_cpu: bool, until: Callable[[], bool]
    ) -> int:
        assert on_cpu  # as the call's config says
        served.append(argv[argv.index("--machine_rank") + 1])
        while not until():
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(hosts.launch, "run_beside", run_beside)
    over = threading.Event()
    thread = threading.Thread(target=host.serve, args=(over.is_set,), daemon=True)
    thread.start()
    yield host, served
    over.set()
    thread.join(5)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_one_machine_calls_nobody(folder: Path) -> None:
    with calling(LaunchSection(), folder) as place:
        assert place == ALONE
        assert not (folder / CALL).exists()


def test_a_call_stands_as_long_as_the_training(folder: Path, tmp_path: Path) -> None:
    with calling(TWO, folder) as place:
        assert place[:6] == [
            "--num_machines",
            "2",
            "--machine_rank",
            "0",
            "--main_process_ip",
            "node-a",
        ]
        wait_for(lambda: bool(calls(tmp_path)))
        assert calls(tmp_path)[0][0] == folder
    assert calls(tmp_path) == []


def test_each_training_is_joined_once(folder: Path, joined: tuple[Joined, list[str]]) -> None:
    _, served = joined
    for number in (1, 2):
        with calling(TWO, folder):
            wait_for(lambda: len(served) == number)  # noqa: B023
            threading.Event().wait(0.05)
        assert served == ["1"] * number


def test_a_call_that_stands_still_is_not_answered(
    folder: Path, joined: tuple[Joined, list[str]]
) -> None:
    _, served = joined
    write_json(
        folder / CALL,
        {"attempt": "old", "config": "cpu_zero2", "processes": 2, "machines": 2, "count": 7},
    )
    threading.Event().wait(0.2)
    assert served == []
    with calling(TWO, folder):
        wait_for(lambda: served == ["1"])


@pytest.mark.parametrize("address", ["", "node-a", "node-a:port", ":29500"])
def test_an_address_without_a_port_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_MAIN_ADDRESS", address)
    with pytest.raises(
        PipelineError, match=r"set it on each of the 2 hosts .* such as node-a:29500"
    ):
        place_of({"machines": 2}, 1)


def test_ranks_are_shared_out_evenly(recipe_with: Callable[..., dict[str, object]]) -> None:
    with pytest.raises(
        RecipeError, match="has 3 processes on 2 machines; give each machine as many"
    ):
        parse_recipe(recipe_with(launch={"config": "cpu_zero2", "processes": 3, "machines": 2}))
