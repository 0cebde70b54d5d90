"""`lora ui`: the MLflow and Prefect pages over the folder of runs."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

from pipelines.console import print_status
from pipelines.orchestration.local_server import HOST, bypass_proxy
from pipelines.paths import tracking_uri

SECONDS_BETWEEN_LOOKS = 0.5
LEASES = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"
}
"""Prefect's server forgets who holds a slot when it ends, unless it is told to write that down."""


def serve(
    runs: Path, once_up: Callable[[str], None], *, mlflow_port: int = 5000, prefect_port: int = 4200
) -> None:
    """Serve both pages until a signal; a port that is taken is replaced by a free one.

    Args:
        runs: the folder of runs.
        once_up: called with the address of Prefect's interface when that answers.
        mlflow_port: wanted for MLflow.
        prefect_port: wanted for Prefect.
    """
    bypass_proxy(HOST)
    mlflow, prefect = _free(mlflow_port), _free(prefect_port)
    store = tracking_uri(runs)
    python = [sys.executable, "-m"]
    commands = [[*python, "prefect", "server", "start", "--host", HOST, "--port", str(prefect)]]
    url = f"http://{HOST}:{prefect}/api"
    print_status(
        f"Prefect  http://{HOST}:{prefect}   (export PREFECT_API_URL={url} to deploy to it)"
    )
    if store.startswith("http"):
        print_status(f"MLflow   {store}")
    else:
        commands.append(
            [
                *python,
                "mlflow",
                "server",
                "--backend-store-uri",
                store,
                "--host",
                HOST,
                "--port",
                str(mlflow),
            ]
        )
        print_status(f"MLflow   http://{HOST}:{mlflow}")
    environment, quiet = {**LEASES, **os.environ}, subprocess.DEVNULL
    servers = [
        subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
        for command in commands
    ]
    try:
        if _answers(url, servers[0]):
            once_up(url)
        for server in servers:
            server.wait()
    except KeyboardInterrupt:
        print_status("stopping")
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(30)


def _answers(url: str, server: "subprocess.Popen[bytes]") -> bool:
    """Wait until Prefect's interface answers; False where its server has ended."""
    while server.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").is_success:
                return True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return False


def _free(port: int) -> int:
    """Return `port` when nothing listens there, else any free port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
