"""A completed run announces a new champion, a proposal, or that nothing passed; else nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_KEY, PREFECT_API_URL, temporary_settings
from summaries import build, parsed
from webhook import Webhook, webhook

from pipelines.comparison.document import Registered
from pipelines.orchestration.events import NOTIFY, announce_result


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
