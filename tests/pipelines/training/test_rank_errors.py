"""Errors of ranks that lost another rank: the other rank's own end stays the recorded cause."""

import pytest

from pipelines.errors import PeerError, StageError
from pipelines.training.rank_errors import name_lost_contact

CLOSED = "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5016"


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def test_lost_contact_is_no_own_error(of_two: None) -> None:
    with pytest.raises(PeerError) as raised, name_lost_contact():
        raise RuntimeError(CLOSED)
    assert str(raised.value).startswith(
        "rank 1 lost another rank outside of the steps (Connection closed by peer [127.0.0.1]:5016)"
    )


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), StageError("rank 0 cannot connect"), ValueError("connection")],
    ids=["own", "pipeline", "value"],
)
def test_other_errors_stay(error: Exception, of_two: None) -> None:
    with pytest.raises(type(error)) as raised, name_lost_contact():
        raise error
    assert raised.value is error


def test_a_single_rank_has_no_peer() -> None:
    with pytest.raises(RuntimeError, match="Connection closed") as raised, name_lost_contact():
        raise RuntimeError(CLOSED)
    assert not isinstance(raised.value, PeerError)
