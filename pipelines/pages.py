"""`lora ui`: the MLflow and Prefect pages over the folder of runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from pipelines.places import tracking_uri
from pipelines.progress import say

HOST = "127.0.0.1"
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
"""Prefect's server forgets who holds a slot when it ends, unless it is told to write that down."""


def serve(runs: Path, *, mlflow_port: int = 5000, prefect_port: int = 4200) -> None:
    """Serve both pages until a signal; a port that is taken is replaced by a free one."""
    mlflow, prefect = _free(mlflow_port), _free(prefect_port)
    store = tracking_uri(runs)
    python = [sys.executable, "-m"]
    commands = [[*python, "prefect", "server", "start", "--host", HOST, "--port", str(prefect)]]
    say(f"Prefect  http://{HOST}:{prefect}   (export PREFECT_API_URL=http://{HOST}:{prefect}/api to deploy to it)")
    if store.startswith("http"):
        say(f"MLflow   {store}")
    else:
        commands.append([*python, "mlflow", "server", "--backend-store-uri", store, "--host", HOST, "--port", str(mlflow)])
        say(f"MLflow   http://{HOST}:{mlflow}")
    environment, quiet = {**LEASES, **os.environ}, subprocess.DEVNULL
    _until_signalled([subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) for command in commands])


def _until_signalled(servers: "list[subprocess.Popen[bytes]]") -> None:
    try:
        for server in servers:
            server.wait()
    except KeyboardInterrupt:
        say("stopping")
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(30)


def _free(port: int) -> int:
    """Return `port` when nothing listens there, else any free port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
