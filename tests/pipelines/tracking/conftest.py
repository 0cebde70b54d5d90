"""MLflow as a file or a server, and a comparison with the folders that training leaves."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from mlflow_clients import reset_mlflow_clients
from registered import (
    SmallVersions,
    configure_store,
    runs_with_store,
    write_adapter,
    write_training,
)
from summaries import Summary, build

START_SECONDS = 180


@pytest.fixture
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Make each test's store a file next to its runs.

    MLflow writes the URI it is given into the environment. Without a URI it creates a file in the
    working directory, which must not be the repository.
    """
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)
    yield
    reset_mlflow_clients()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs per module, with a store."""
    return runs_with_store(tmp_path_factory)


@pytest.fixture
def comparison(tmp_path: Path, request: pytest.FixtureRequest) -> Summary:
    """A comparison with the test's own name, with the folders that training leaves."""
    summary = build(tmp_path)
    name = request.node.name.partition("[")[0]
    summary |= {"name": name, "key": name.ljust(64, "k")}
    summary["recipe"]["registry"]["model"] = name
    for label, model in summary["models"].items():
        folder = tmp_path / "train" / label
        if "training" in model:
            model["training"]["folder"] = str(write_training(folder))
        if "judgment" in model:
            saved = model["training"]["result"]["saved"]
            saved["adapter_sha256"] = write_adapter(folder / "adapter", label)
    return summary


@pytest.fixture
def small(own_store: None, runs: Path, tmp_path: Path) -> SmallVersions:
    """Adds versions of one small file to the module's store."""
    configure_store(runs)
    return SmallVersions(runs, tmp_path)


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """A function that starts an MLflow server and returns its address.

    Its arguments are options of the server, and `environment`.
    """
    with ExitStack() as servers:

        def start(*options: str, environment: Mapping[str, str] | None = None) -> str:
            folder = tmp_path_factory.mktemp("server")
            server = _mlflow_server(folder, *options, environment=environment)
            return servers.enter_context(server)

        yield start


@contextmanager
def _mlflow_server(
    folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server inside a block; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), *options]
    with (folder / "server.txt").open("wb") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, **(environment or {})},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(server, address, folder)
        yield address
    finally:
        everything = [*psutil.Process(server.pid).children(recursive=True), server]
        for one in everything:
            one.terminate()
        server.wait(30)


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            is_dead = server.poll() is not None
            if is_dead or time.monotonic() > deadline:
                output = (folder / "server.txt").read_text()
                raise AssertionError(f"the server did not start: {output}") from None
            time.sleep(0.2)
