"""Slots are named after GPUs or cores, and acquired only from a shared server."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import ObjectAlreadyExists

from pipelines.errors import PipelineError
from pipelines.orchestration import concurrency
from pipelines.orchestration.concurrency import gpus, hold_slots, slot_names
from pipelines.workflow import tasks


class FakeServer:
    """A fake server: limits by name, and the acquired slots."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}
        self.acquired: list[Any] = []
        self.error: Exception | None = None
        self.gone = False
        """Whether it fails to answer when a slot is released."""

    def __enter__(self) -> "FakeServer":
        if isinstance(self.error, httpx.HTTPError):
            raise self.error
        return self

    def __exit__(self, *_: object) -> None: ...

    def create_global_concurrency_limit(self, limit: Any) -> None:
        assert limit.limit == 1
        if limit.name in self.taken:
            raise ObjectAlreadyExists(Exception())
        self.taken[limit.name] = 0

    def read_global_concurrency_limit_by_name(self, name: str) -> Any:
        return SimpleNamespace(active=True, active_slots=self.taken[name], limit=1)

    @contextmanager
    def concurrency(self, names: list[str], **options: Any) -> Iterator[None]:
        if self.error is not None:
            raise self.error
        assert options["strict"] and not options["raise_on_lease_renewal_failure"]
        self.acquired.append(names)
        yield
        if self.gone:
            raise httpx.ConnectError("refused")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """Replace the server of PREFECT_API_URL by a fake one."""
    one = FakeServer()
    monkeypatch.setattr(
        concurrency, "PREFECT_API_URL", SimpleNamespace(value=lambda: "http://team/api")
    )
    monkeypatch.setattr(concurrency, "get_client", lambda sync_client: one)
    monkeypatch.setattr(concurrency, "concurrency", one.concurrency)
    monkeypatch.setattr(concurrency, "gethostname", lambda: "node-a")
    return one


@pytest.mark.parametrize(
    ("chosen", "count", "names"),
    [
        ("0,1,2,3", 2, ["gpu:node-a:0", "gpu:node-a:1"]),
        # A second worker of the host, with other GPUs.
        ("4,5", 2, ["gpu:node-a:4", "gpu:node-a:5"]),
        # Ranks that share one GPU.
        ("2", 4, ["gpu:node-a:2"]),
        ("", 2, ["cpu:node-a"]),
        ("-1", 1, ["cpu:node-a"]),
    ],
)
def test_a_slot_is_named_after_the_gpu(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, chosen: str, count: int, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert slot_names(count) == names


def test_gpus_are_counted_without_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert all(gpu.isdigit() for gpu in gpus())


def test_slots_are_created_once_and_acquired(server: FakeServer) -> None:
    printed: list[str] = []
    for _ in range(2):
        with hold_slots(["gpu:node-a:0", "gpu:node-a:1"], printed.append):
            pass
    assert server.acquired == [["gpu:node-a:0", "gpu:node-a:1"]] * 2
    assert printed == []


def test_a_waiting_run_names_the_slot(server: FakeServer) -> None:
    server.taken["gpu:node-a:1"] = 1
    printed: list[str] = []
    with hold_slots(["gpu:node-a:0", "gpu:node-a:1"], printed.append):
        pass
    assert printed == ["waiting for gpu:node-a:1, which another run uses"]


def refusal(status: int | None) -> ConcurrencySlotAcquisitionError:
    """Return the error that Prefect raises for any failure, with its cause."""
    error = ConcurrencySlotAcquisitionError("Unable to acquire concurrency slots on ['cpu:node-a']")
    request = httpx.Request("POST", "http://team/api")
    error.__cause__ = httpx.ConnectError("refused")
    if status is not None:
        error.__cause__ = httpx.HTTPStatusError(
            "no", request=request, response=httpx.Response(status, request=request)
        )
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx.ConnectError("refused"), "gives no slot on this host"),
        (refusal(None), "gives no slot on this host"),
        (refusal(500), "gives no slot on this host"),
        (refusal(422), "a limit of 0 rejects trainings here"),
    ],
)
def test_a_server_without_a_free_slot_is_a_user_error(
    server: FakeServer, error: Exception, words: str
) -> None:
    server.error = error
    with pytest.raises(PipelineError, match=words), hold_slots(["cpu:node-a"], print):
        pass


def test_an_error_does_not_show_the_account_of_the_server(server: FakeServer) -> None:
    server.error = httpx.ConnectError("refused by http://anna:planted@team/api")
    with (
        pytest.raises(PipelineError, match=r"refused by http://team/api"),
        hold_slots(["cpu:node-a"], print),
    ):
        pass


@pytest.mark.parametrize("ended", [None, ArithmeticError])
def test_a_server_that_is_away_at_the_end_does_no_harm(
    server: FakeServer, ended: type[Exception] | None
) -> None:
    server.gone = True
    printed: list[str] = []
    with (
        pytest.raises(ended) if ended else nullcontext(),
        hold_slots(["cpu:node-a"], printed.append),
    ):
        if ended:
            raise ended
    assert "cpu:node-a are free in 120 s" in printed[0]


def test_without_a_server_no_slot_is_acquired(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "PREFECT_API_URL", SimpleNamespace(value=lambda: None))
    with hold_slots(["cpu:node-a"], print):
        pass
    assert server.taken == {}


def test_scoring_holds_gpus_only_and_only_for_missing_results(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, missing = SimpleNamespace(result=dict), SimpleNamespace(result=lambda: None)
    for chosen, stages in (("0,1,2", [done, missing, missing]), ("0,1,2", [done]), ("", [missing])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        with tasks.evaluation_slots(stages, 3):  # type: ignore[arg-type]
            pass
    assert server.acquired == [["gpu:node-a:0", "gpu:node-a:1", "gpu:node-a:2"]]
