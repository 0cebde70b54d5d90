"""A team's host: a real Prefect server and a real worker on the pool of `lora deploy`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prefect_tables import add_tables

from pipelines.orchestration.pages import LEASES
from pipelines.runtime import fork_server

LORA = str(Path(sys.executable).parent / "lora")
RETRIES = 20
CANCELLING = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
SUSPENDED = {
    "state": {
        "type": "PAUSED",
        "name": "Suspended",
        "state_details": {"pause_reschedule": True, "pause_timeout": None},
    }
}
Answer = Any


@dataclass
class PrefectHost:
    """Server and worker, and requests to them."""

    folder: Path
    """Of logs, state and runs."""
    port: int
    extra: dict[str, str] = field(default_factory=dict)
    """Further variables of the environment."""
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Return a user's environment: the server's address, and a separate state folder."""
        return {
            **os.environ,
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            **LEASES,
            "PREFECT_WORKER_QUERY_SECONDS": "2",  # instead of 10
            "LORA_RUNS": str(self.folder / "runs"),
            "HF_HUB_OFFLINE": "1",
            **self.extra,
        }

    def get(self, path: str) -> Answer:
        return self._answer("GET", path)

    def post(self, path: str, **values: Any) -> Answer:
        return self._answer("POST", path, json=values)

    def change(self, path: str, **values: Any) -> None:
        """Change an object, as its page does."""
        self._request("PATCH", path, json=values)

    def lora(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run the command line in the folder of the recipes."""
        return subprocess.run(
            [LORA, *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start_worker(self) -> None:
        self.processes.append(
            self._start(
                ["worker", "start", "--pool", "lora", "--type", "process"],
                "worker.txt",
                self.environment,
            )
        )

    def restart_server(self) -> None:
        """Kill the server with SIGKILL and start it again."""
        server = self.processes.pop(0)
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.kill()
        server.wait(10)
        self._start_server_process()

    def kill_worker(self) -> None:
        """Kill the worker with SIGKILL."""
        worker = self.processes.pop()
        worker.kill()
        worker.wait(10)

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"deployments/name/finetune/{name}")
        return found

    def run(self, deployment: str, **parameters: Any) -> str:
        """Start a run of a deployment; return its id."""
        path = f"deployments/{deployment}/create_flow_run"
        return str(self.post(path, parameters=parameters)["id"])

    def cancel(self, run: str) -> None:
        """Cancel a run, as its page does."""
        assert self.post(f"flow_runs/{run}/set_state", **CANCELLING)["status"] == "ACCEPT"

    def suspend(self, run: str) -> None:
        """Suspend a run, as its page does."""
        assert self.post(f"flow_runs/{run}/set_state", **SUSPENDED)["status"] == "ACCEPT"

    def resume(self, run: str) -> None:
        assert self.post(f"flow_runs/{run}/resume")["status"] == "ACCEPT"

    def state(self, run: str) -> str:
        return str(self.get(f"flow_runs/{run}")["state"]["type"])

    def log(self, run: str) -> list[str]:
        return [
            line["message"]
            for line in self.post("logs/filter", logs={"flow_run_id": {"any_": [run]}})
        ]

    def slots(self) -> list[int]:
        """Return the number of active slots of each limit of this host: its cores, or each GPU."""
        limits = self.post("v2/concurrency_limits/filter")
        own = [limit for limit in limits if limit["name"].startswith(("cpu:", "gpu:"))]
        return sorted({limit["active_slots"] for limit in own})

    def start_server(self) -> None:
        add_tables(self.folder / "prefect")
        self._start_server_process()

    def _start_server_process(self) -> None:
        """Start the server; it is the first of the processes."""
        without_url = {
            name: value for name, value in self.environment.items() if name != "PREFECT_API_URL"
        }
        words = ["server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.processes.insert(0, self._start(words, "server.txt", without_url))
        until(lambda: self.get("health") is True, seconds=120)

    def end(self) -> None:
        """End both with all their children: a worker would wait for its current runs."""
        for process in reversed(self.processes):
            everything = [
                *psutil.Process(process.pid).children(recursive=True),
                psutil.Process(process.pid),
            ]
            process.terminate()
            psutil.wait_procs(everything, timeout=5)
            for one in everything:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait(10)

    def _answer(self, method: str, path: str, **options: Any) -> Answer:
        return self._request(method, path, **options).json()

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Return the server's reply.

        While its database is locked the server replies 503; Prefect's own client retries too.
        """
        for _ in range(RETRIES):
            reply = httpx.request(
                method, f"http://127.0.0.1:{self.port}/api/{path}", timeout=30, **options
            )
            if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        return reply.raise_for_status()

    def _start(
        self, arguments: list[str], log: str, environment: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        with (self.folder / log).open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                env=environment,
                stdout=stream,
                stderr=stream,
            )


@contextmanager
def prefect_host(folder: Path, **extra: str) -> Iterator[PrefectHost]:
    """Run a server and a worker inside a block, with further variables of the environment."""
    host = PrefectHost(folder, free_port(), extra)
    try:
        host.start_server()
        host.start_worker()
        yield host
    finally:
        host.end()


def until(condition: Callable[[], bool], *, seconds: float) -> None:
    """Wait for a condition; a server may not respond yet.

    Raises:
        TimeoutError: the condition is not met in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if condition():
                return
        time.sleep(0.5)
    raise TimeoutError


def command_lines() -> list[str]:
    """Return the command lines of all processes, as `ps` shows them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found


def processes_of(host: PrefectHost) -> list[str]:
    """Return the commands of all processes of a run: flows, fork servers and their children."""
    found = _processes_with(host, "prefect.engine", fork_server.__name__)
    return list(found.values())


def suspend_training(host: PrefectHost) -> list[psutil.Process]:
    """Stop the fork server of a run and its children; return them, to be resumed."""
    stopped = list(_processes_with(host, fork_server.__name__))
    for process in stopped:
        process.suspend()
    return stopped


def _processes_with(host: PrefectHost, *modules: str) -> dict[psutil.Process, str]:
    """Return the processes of a host's runs that run one of the modules, and their commands."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            ours = process.environ().get("LORA_RUNS") == host.environment["LORA_RUNS"]
            if ours and {*modules} & {*words}:
                found[process] = " ".join(words)
    return found


def free_port() -> int:
    """Return a free port; other tests may run at the same time."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
