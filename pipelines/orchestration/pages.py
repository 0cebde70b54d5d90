"""`lora ui`: the MLflow and Prefect pages for the folder of runs."""

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
from pipelines.errors import without_credentials
from pipelines.orchestration.local_server import HOST, bypass_proxy
from pipelines.paths import tracking_uri

POLL_SECONDS = 0.5
LEASE_STORAGE = "prefect.server.concurrency.lease_storage.filesystem"
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASE_STORAGE}
"""By default, Prefect's server loses the leases of slots when it ends; this setting stores them."""
MODEL_TRAINING = "#/experiments?workflowType=machine_learning"
"""MLflow's page with the experiments; without this, its home page shows chats."""
WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""MLflow's server starts no workers for background jobs, which its pages do not need."""


def serve(
    runs: Path, once_up: Callable[[str], None], *, mlflow_port: int = 5000, prefect_port: int = 4200
) -> None:
    """Serve both pages until a signal; use a free port if one is taken.

    Args:
        runs: the folder of runs.
        once_up: called with the address of Prefect's API when it answers.
        mlflow_port: preferred port of MLflow.
        prefect_port: preferred port of Prefect.
    """
    bypass_proxy(HOST)
    mlflow = _free_port(mlflow_port)
    prefect = _free_port(prefect_port)
    store = tracking_uri(runs)
    address = f"http://{HOST}:{prefect}"
    url = f"{address}/api"
    print_status(f"Prefect  {address}   (export PREFECT_API_URL={url} to deploy to it)")
    commands = [_command("prefect", "server", "start", "--host", HOST, "--port", str(prefect))]
    if store.startswith("http"):
        print_status(f"MLflow   {without_credentials(store).rstrip('/')}/{MODEL_TRAINING}")
    else:
        options = ["--host", HOST, "--port", str(mlflow)]
        commands.append(_command("mlflow", "server", *options))
        print_status(f"MLflow   http://{HOST}:{mlflow}/{MODEL_TRAINING}")
    servers = [_start(command, store) for command in commands]
    try:
        if _wait_until_up(url, servers[0]):
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


def _command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _start(command: list[str], store: str) -> "subprocess.Popen[bytes]":
    # An argument with the password of a database would be in the list of processes.
    environment = {**LEASES, **WITHOUT_JOBS, **os.environ, "MLFLOW_BACKEND_STORE_URI": store}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)


def _wait_until_up(url: str, server: "subprocess.Popen[bytes]") -> bool:
    """Wait until Prefect's API answers; return False if its server has ended."""
    while server.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").is_success:
                return True
        time.sleep(POLL_SECONDS)
    return False


def _free_port(port: int) -> int:
    """Return `port` if it is free, else any free port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
