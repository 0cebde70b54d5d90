"""The command line, as a user runs it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from pipelines.orchestration import local_server

LORA = [str(Path(sys.executable).parent / "lora")]


def lora(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a folder, as a user does."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "LORA_RUNS": str(folder / "runs"),
        **environment,
    }
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        if name not in environment:
            env.pop(name, None)
    return subprocess.run(
        [*LORA, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@contextmanager
def shared_prefect_server(home: Path) -> Iterator[str]:
    """Run one Prefect server for several runs, which would each start their own.

    Yields:
        The value of PREFECT_API_URL.
    """
    home.mkdir(parents=True)
    with socket.create_server((local_server.HOST, 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", local_server.__name__, str(listener.fileno())],
            env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_UI_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
        url = f"http://{local_server.HOST}:{listener.getsockname()[1]}/api"
    with process:  # closes the pipe, which ends the server
        answer = httpx.get(f"{url}/health", timeout=local_server.SECONDS_TO_START)
        answer.raise_for_status()
        yield url
