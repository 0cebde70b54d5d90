"""A completed run announces a new champion, a proposal, or that nothing passed; else nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from command import shared_prefect_server
from prefect.settings import (
    PREFECT_API_KEY,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)
from summaries import build, parsed
from webhook import SECRET_PATH, Webhook, webhook

from pipelines.comparison.document import Registered
from pipelines.console import console
from pipelines.errors import PipelineError
from pipelines.orchestration.deploy_options import DeployOptions
from pipelines.orchestration.events import NOTIFY, _stored_address, announce_result, store_address


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """Serve the webhook that the environment names.

    Prefect sends no event: with a key and no address, it does not start a server of its own.
    """
    settings = {PREFECT_API_URL: None, PREFECT_API_KEY: "unused"}
    with temporary_settings(settings), webhook() as chat:
        monkeypatch.setenv(NOTIFY, chat.url)
        yield chat


def registered(**aliases: int) -> Registered:
    return Registered(
        tracking_uri="http://mlflow.example",
        experiment_id="1",
        parent_run="run",
        runs={},
        model="pairs",
        versions={},
        aliases=aliases,
    )


@pytest.mark.parametrize(
    ("aliases", "text"),
    [
        ({"candidate": 4, "champion": 3}, "version 3 of pairs is the new champion"),
        ({"candidate": 4, "proposed": 3}, "version 3 of pairs waits for a decision"),
    ],
    ids=["champion", "proposed"],
)
def test_a_moved_alias_is_announced(
    aliases: dict[str, int], text: str, chat: Webhook, tmp_path: Path
) -> None:
    summary = parsed(build(tmp_path))
    announce_result(summary, registered(**aliases))
    assert chat.texts == [f"{summary.name}: {text}: {summary.decision}"]


def test_the_same_champion_is_not_announced_again(chat: Webhook, tmp_path: Path) -> None:
    announce_result(parsed(build(tmp_path)), registered(candidate=4))
    assert chat.texts == []


def test_a_run_without_a_champion_is_announced(chat: Webhook, tmp_path: Path) -> None:
    summary = parsed({**build(tmp_path), "champion": None, "decision": "no adapter passes"})
    announce_result(summary, registered(candidate=4))
    assert chat.texts == [f"{summary.name}: no adapter passes"]


def test_a_deployed_address_gets_the_messages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server stores it encrypted: it is in no file of the server."""
    monkeypatch.delenv(NOTIFY, raising=False)
    home = tmp_path / "prefect"
    with (
        shared_prefect_server(home) as url,
        webhook() as chat,
        temporary_settings({PREFECT_API_URL: url}),
    ):
        summary = parsed(build(tmp_path))
        announce_result(summary, registered(champion=3))
        assert chat.texts == []
        store_address(summary.name.replace("_", "."), "https://hooks.example")
        store_address(summary.name, chat.url)
        store_address(summary.name.upper(), "https://hooks.example")
        announce_result(summary, registered(champion=3))
        assert len(chat.texts) == 1
        files = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
        assert files and not any(SECRET_PATH.encode() in content for content in files)
        store_address(summary.name, "")
        announce_result(summary, registered(champion=3))
        assert len(chat.texts) == 1


def test_a_server_that_is_away_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(NOTIFY, raising=False)
    away = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(away), console.capture() as shown:
        assert _stored_address("tickets") == ""
    assert "no message is sent: the Prefect server does not answer" in shown.get()


@pytest.mark.parametrize("url", ["hooks.example", "ftp://host/x", "https:///x"])
def test_an_address_that_cannot_be_posted_to_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(PipelineError, match="must begin with https:// or http://") as refused:
        DeployOptions(notify=url).requested()
    assert url not in str(refused.value)
