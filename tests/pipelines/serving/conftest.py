"""A registry with two adapters of one tiny base, and a running `lora serve`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from registered import configure_store, runs_with_store
from served_adapters import (
    RunningServer,
    SmallRegistry,
    register_adapter,
    save_adapter_of,
    save_sharp_base,
)

START_SECONDS = 240


@pytest.fixture(scope="session")
def sharp_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharp_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def small_registry(
    sharp_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SmallRegistry]:
    """The adapters sales and support, each version 1 and champion."""
    pytest.importorskip("mlflow")
    runs = runs_with_store(tmp_path_factory)
    folder = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("LORA_RUNS", str(runs))
        configure_store(runs)
        folders = {}
        for seed, name in enumerate(("sales", "support", "later"), start=1):
            folders[name] = save_adapter_of(sharp_base, folder / name, seed=seed)
        for name in ("sales", "support"):
            register_adapter(runs, name, folders[name])
        yield SmallRegistry(runs, sharp_base, folders)


@pytest.fixture
def running_server(small_registry: SmallRegistry, tmp_path: Path) -> Iterator[RunningServer]:
    """A server of both adapters that looks for moved aliases often."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.cli", "serve", "sales@champion", "support/1"]
    command += ["--port", str(port), "--poll", "0.2", "--to", str(tmp_path / "pulled")]
    environment = {
        **os.environ,
        "LORA_RUNS": str(small_registry.runs),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "LORA_API_KEY"):
        environment.pop(name, None)
    log = tmp_path / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    server = RunningServer(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_up(server)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def _wait_until_up(server: RunningServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            # the server listens before its models are loaded, and answers once they are
            if httpx.get(f"{server.url}/health", timeout=START_SECONDS).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    pytest.fail(f"the server does not start: {server.log.read_text()[-2000:]}")
