"""An MLflow server with accounts, and commands of the command line as one of its users."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import psutil
from command import LORA
from composed import free_port
from mlflow_accounts import (
    ADMIN,
    ADMIN_PASSWORD,
    SERVER_OPTIONS,
    logged_in,
    server_environment,
)
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.errors import PipelineError

START_SECONDS = 300
NAME = "tickets"
CANDIDATES = "tickets-candidates"


@dataclass
class TeamServer:
    """The server, and everything that its users' commands printed."""

    address: str
    folder: Path
    in_process: bool
    passwords: dict[str, str] = field(default_factory=lambda: {ADMIN: ADMIN_PASSWORD})
    transcript: list[str] = field(default_factory=list)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def environment(self, user: str) -> dict[str, str]:
        """Return the environment of a user's commands."""
        return {
            **os.environ,
            "COLUMNS": "120",
            "HF_HUB_OFFLINE": "1",
            "LORA_RUNS": str(self.runs),
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": self.passwords[user],
        }

    def lora(self, user: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a command as a user, and append it to the transcript."""
        ended = self._within(user, words) if self.in_process else self._started(user, words)
        output = (ended.stdout + ended.stderr).rstrip()
        self.transcript.append(f"{user}$ lora {' '.join(words)}\n{output}\n[{ended.returncode}]\n")
        return ended

    def _within(self, user: str, words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        """Run a command in this process, which has imported its libraries."""
        with logged_in(user, self.passwords[user]):
            result = CliRunner().invoke(app, words)
        if isinstance(result.exception, PipelineError):
            return subprocess.CompletedProcess(words, 2, "", str(result.exception))
        return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)

    def _started(self, user: str, words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*LORA, *words],
            cwd=self.folder,
            env=self.environment(user),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )


@contextmanager
def team_server(folder: Path, *, in_process: bool) -> Iterator[TeamServer]:
    """Run a server with accounts until the block ends.

    Args:
        folder: gets its files, and the folder of runs.
        in_process: run commands in this process, which saves their imports.
    """
    state = folder / "server"
    state.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}"]
    command += ["--workers=1", f"--backend-store-uri=sqlite:///{state / 'server.db'}"]
    command += [f"--artifacts-destination={state / 'artifacts'}", *SERVER_OPTIONS]
    env = {**os.environ, **server_environment(state)}
    address = f"http://127.0.0.1:{port}"
    with (state / "log.txt").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=state, env=env)
    try:
        _wait(server, address, state)
        yield TeamServer(address, folder, in_process)
    finally:
        family = [*psutil.Process(server.pid).children(recursive=True), server]
        for one in family:
            one.terminate()
        for one in psutil.wait_procs(family[:-1], timeout=20)[1]:
            one.kill()
        server.wait(120)


def _wait(server: "subprocess.Popen[bytes]", address: str, state: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                log = (state / "log.txt").read_text()[-2000:]
                raise AssertionError(f"the server did not start: {log}") from None
            time.sleep(0.2)


def found_secrets(server: TeamServer, secrets: Mapping[str, str]) -> list[str]:
    """Return where a password is: in output, a file of server or runs, or an argument."""
    found = []
    texts = {"the transcript": "\n".join(server.transcript).encode()}
    for folder in (server.folder / "server", server.runs):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                texts[str(path.relative_to(server.folder))] = path.read_bytes()
    for process in psutil.process_iter(["cmdline"]):
        texts[f"process {process.pid}"] = " ".join(process.info["cmdline"] or []).encode()
    for place, content in texts.items():
        for user, secret in secrets.items():
            if secret.encode() in content:
                found.append(f"the password of {user} in {place}")
    return found
