"""The MLflow server of `lora ui` gets its database, which may have a password, unseen by `ps`."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.orchestration import pages

STORE = "postgresql://anna:planted@db.example/mlflow"
SERVER = f"""
import os
import sys

sys.exit(os.environ['MLFLOW_BACKEND_STORE_URI'] != {STORE!r})
"""


def test_the_address_of_the_database_is_in_the_environment_and_no_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", STORE)
    for name in ("NO_PROXY", "no_proxy"):  # `serve` changes them
        monkeypatch.setenv(name, "")
    commands: list[list[str]] = []
    servers: list[subprocess.Popen[bytes]] = []
    start = pages._start

    def start_substitute(command: list[str], store: str) -> "subprocess.Popen[bytes]":
        commands.append(command)
        servers.append(start([sys.executable, "-c", SERVER], store))
        return servers[-1]

    monkeypatch.setattr(pages, "_start", start_substitute)
    pages.serve(tmp_path, pytest.fail)
    assert ["mlflow" in command for command in commands] == [False, True]
    assert "planted" not in str(commands)
    assert [server.returncode for server in servers] == [0, 0]
