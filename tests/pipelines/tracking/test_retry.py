"""A server that is away for a moment is asked again; one that refuses is not, and patience ends."""

import time

import pytest

from pipelines.errors import RegistryError, UnreachableError
from pipelines.tracking.retry import until_it_answers


class Server:
    """Is away for some calls, or refuses each."""

    def __init__(self, away: int, error: type[RegistryError] = UnreachableError) -> None:
        self.away, self.error, self.calls = away, error, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.away:
            raise self.error("no answer")
        return self.calls


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pauses pass at once."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


def test_a_server_that_comes_back_is_asked_again() -> None:
    assert until_it_answers(Server(away=5)) == 6


def test_one_that_stays_away_is_given_up_after_a_while() -> None:
    server = Server(away=1000)
    with pytest.raises(UnreachableError, match="no answer"):
        until_it_answers(server)
    assert time.monotonic() == pytest.approx(90) and server.calls > 5


def test_the_user_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY_SECONDS", "3")
    with pytest.raises(UnreachableError):
        until_it_answers(Server(away=1000))
    assert time.monotonic() == pytest.approx(3)


def test_a_refusal_is_not_asked_again() -> None:
    server = Server(away=1, error=RegistryError)
    with pytest.raises(RegistryError):
        until_it_answers(server)
    assert server.calls == 1
