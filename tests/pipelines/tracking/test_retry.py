"""Requests are retried while the server is away, for a limited time; refusals are not retried."""

import time
from io import StringIO

import pytest

from pipelines.console import console
from pipelines.errors import RegistryError, UnreachableError
from pipelines.tracking.retry import retry_until_reachable


class FakeServer:
    """Is away for some calls, or refuses each."""

    def __init__(self, away: int, error: type[RegistryError] = UnreachableError) -> None:
        self.away = away
        self.error = error
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.away:
            raise self.error("no answer")
        return self.calls


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pauses pass at once."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)


def test_request_is_retried_until_the_server_is_back() -> None:
    assert retry_until_reachable(FakeServer(away=5)) == 6


def test_retrying_stops_after_90_seconds() -> None:
    server = FakeServer(away=1000)
    with pytest.raises(UnreachableError, match="no answer"):
        retry_until_reachable(server)
    assert time.monotonic() == pytest.approx(90)
    assert server.calls > 5


def test_environment_variable_sets_the_retry_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY_SECONDS", "3")
    with pytest.raises(UnreachableError):
        retry_until_reachable(FakeServer(away=1000))
    assert time.monotonic() == pytest.approx(3)


def test_printed_reason_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = StringIO()
    monkeypatch.setattr(console, "file", printed)
    calls = iter([UnreachableError("no answer from http://user:secret@host/"), None])

    def request() -> None:
        error = next(calls)
        if error is not None:
            raise error

    retry_until_reachable(request)
    assert "http://host/" in printed.getvalue()
    assert "secret" not in printed.getvalue()


def test_refused_request_is_not_retried() -> None:
    server = FakeServer(away=1, error=RegistryError)
    with pytest.raises(RegistryError):
        retry_until_reachable(server)
    assert server.calls == 1
