"""A real local Prefect server ignores signals, and ends together with its run."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect_host import until

from pipelines.cli import RETRYABLE_ERRORS
from pipelines.errors import PipelineError, StageError
from pipelines.orchestration import local_server

pytestmark = pytest.mark.server
NOWHERE = "http://127.0.0.1:9"
"""A configured proxy that cannot reach a server on this host."""
RUN = """
import sys
from prefect.client.orchestration import get_client
from pipelines.orchestration.concurrency import hold_slots
from pipelines.orchestration.local_server import prefect_server

with prefect_server(), get_client(sync_client=True) as client, hold_slots(["cpu:here"], print):
    assert not client.read_global_concurrency_limits()  # a local server gets no limits
    print(client.api_url, flush=True)
    sys.stdin.read()
"""


def test_it_survives_signals_but_not_the_end_of_its_run(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "HTTP_PROXY": NOWHERE,
    }
    for name in ("PREFECT_API_URL", "NO_PROXY", "no_proxy"):
        environment.pop(name, None)
    for kill in (False, True):
        with subprocess.Popen(
            [sys.executable, "-c", RUN], env=environment, stdin=PIPE, stdout=PIPE, text=True
        ) as run:
            assert run.stdin is not None
            assert run.stdout is not None
            url = run.stdout.readline().strip()
            (server,) = psutil.Process(run.pid).children()
            for ending in (signal.SIGINT, signal.SIGTERM):
                server.send_signal(ending)
            assert httpx.get(f"{url}health", timeout=30).json() is True
            if kill:
                run.kill()
            else:
                run.stdin.close()
            assert run.wait(30) == (-signal.SIGKILL if kill else 0)
        until(
            lambda server=server: (
                not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
            ),
            seconds=20,
        )
    assert (tmp_path / "server.log").read_text() == ""


def test_a_local_server_that_does_not_start_is_an_error_that_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server.sys, "executable", "false")
    monkeypatch.setattr(
        local_server, "PREFECT_HOME", type("Home", (), {"value": staticmethod(lambda: tmp_path)})
    )
    monkeypatch.setattr(local_server, "_servers", [])
    with pytest.raises(PipelineError, match=r"does not start .*see .*server\.log"):
        local_server._start()


def test_a_configured_server_that_is_away_is_a_retryable_error() -> None:
    gone = "http://user:word@127.0.0.1:9/api"
    with (
        temporary_settings({PREFECT_API_URL: gone, PREFECT_CLIENT_MAX_RETRIES: 0}),
        pytest.raises(
            StageError, match=r"^the Prefect server at 127\.0\.0\.1:9 does not answer this run"
        ) as caught,
        local_server.prefect_server(),
    ):
        pass
    assert caught.value.kind in RETRYABLE_ERRORS


def test_a_server_that_fails_during_the_run_is_a_retryable_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        local_server,
        "get_client",
        lambda sync_client: nullcontext(SimpleNamespace(api_healthcheck=lambda: None)),
    )
    with (
        temporary_settings({PREFECT_API_URL: "http://team/api"}),
        pytest.raises(StageError, match="does not answer"),
        local_server.prefect_server(),
    ):
        raise httpx.ReadTimeout("no answer in 60 s")
