"""A host that joins a training holds its slots on a real server meanwhile."""

from pathlib import Path

import pytest
from command import shared_prefect_server
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.orchestration.concurrency import slot_names
from pipelines.runtime.hosts import JoiningHost

pytestmark = pytest.mark.server


def active_slots(name: str) -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(name).active_slots


def test_join_holds_the_slots_of_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [name] = slot_names(1)
    seen: list[int] = []

    def hold_once(host: JoiningHost) -> None:
        with host.hold(1):
            seen.append(active_slots(name))
        seen.append(active_slots(name))

    monkeypatch.setattr(JoiningHost, "serve", hold_once)
    monkeypatch.setenv("LORA_RUNS", str(tmp_path))
    with (
        shared_prefect_server(tmp_path / "prefect") as url,
        temporary_settings({PREFECT_API_URL: url}),
    ):
        monkeypatch.setenv("PREFECT_API_URL", url)
        joined = CliRunner().invoke(app, ["join", "--machine", "1"], catch_exceptions=False)
    assert joined.exit_code == 0
    assert seen == [1, 0]
