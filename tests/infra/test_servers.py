"""The servers of the compose file run without containers, on a Postgres with their databases."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from tiny import tiny_recipe

pytestmark = [pytest.mark.server, pytest.mark.slow]

COMPOSE: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[2] / "infra" / "compose.yaml").read_text()
)
BIN = Path(sys.executable).parent
LOCK = "somebody:secret"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (httpx.TransportError, OSError):
            pass
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.5)


@contextmanager
def started(
    command: Sequence[str], log: Path, env: dict[str, str], user: str | None = None
) -> Iterator[None]:
    """Run a command until the block ends; stop all of its processes then."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=env, stdout=stream, stderr=subprocess.STDOUT, user=user, cwd=log.parent
        )
    try:
        yield
    finally:
        family = [
            *psutil.Process(process.pid).children(recursive=True),
            psutil.Process(process.pid),
        ]
        process.terminate()
        for one in psutil.wait_procs(family, timeout=20)[1]:
            one.kill()
        process.wait(20)


def postgres_tool(name: str) -> str:
    """Return the path of a Postgres program (Debian installs it outside PATH); skip without it."""
    for path in [shutil.which(name), *map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))]:
        if path is not None:
            return path
    pytest.skip(f"{name} is missing: Postgres is not installed")


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """Run a Postgres with the databases of the compose file; yield its port."""
    service, port = COMPOSE["services"]["postgres"]["environment"], free_port()
    user = "postgres" if os.getuid() == 0 else None  # Postgres refuses to run as root
    initdb, server, psql = map(postgres_tool, ("initdb", "postgres", "psql"))
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    env = {**os.environ, "PGPASSWORD": "secret"}
    try:
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        (folder / "password").write_text("secret")
        (folder / "password").chmod(0o644)
        made = [
            initdb,
            "--pgdata",
            str(folder / "data"),
            "--username",
            service["POSTGRES_USER"],
            "--pwfile",
            str(folder / "password"),
        ]
        subprocess.run(
            [*made, "--auth", "scram-sha-256"],
            user=user,
            check=True,
            capture_output=True,
            cwd=folder,
        )
        listening = [
            "-D",
            str(folder / "data"),
            "-p",
            str(port),
            "-h",
            "127.0.0.1",
            "-k",
            str(folder),
        ]
        connected = [
            psql,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--username",
            service["POSTGRES_USER"],
            "--dbname",
            "postgres",
        ]
        with started([server, *listening], folder / "log.txt", env, user):
            until(
                lambda: (
                    subprocess.run(
                        [*connected, "--command", "SELECT 1"],
                        env=env,
                        capture_output=True,
                        check=False,
                    ).returncode
                    == 0
                )
            )
            subprocess.run(
                connected,
                input=COMPOSE["configs"]["databases"]["content"],
                env=env,
                text=True,
                check=True,
                capture_output=True,
            )
            yield port
    finally:
        shutil.rmtree(folder)


@contextmanager
def served(name: str, postgres: int, state: Path) -> Iterator[str]:
    """Run a service of the compose file with free ports and local paths; yield its address."""
    service, port = COMPOSE["services"][name], free_port()
    inside = service["ports"][0].rpartition(":")[2]
    new = {
        "0.0.0.0": "127.0.0.1",
        inside: str(port),
        "/state": str(state),
        "postgres:5432": f"127.0.0.1:{postgres}",
        "${POSTGRES_PASSWORD}": "secret",
    }

    def here(text: str) -> str:
        text = LOCK if text.startswith("${PREFECT_API_AUTH_STRING") else text
        for old, replacement in new.items():
            text = text.replace(old, replacement)
        return text

    plain = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "MLFLOW_"))
    }
    env = plain | {key: here(value) for key, value in service["environment"].items()}
    command = [str(BIN / service["command"][0]), *map(here, service["command"][1:])]
    with started(command, state / "log.txt", env):
        yield f"http://127.0.0.1:{port}"


def test_prefect_requires_the_password(postgres: int, tmp_path: Path) -> None:
    with served("prefect", postgres, tmp_path) as address:
        until(lambda: httpx.get(f"{address}/api/health").status_code == 200)
        pools = f"{address}/api/work_pools/filter"
        assert httpx.post(pools, json={}).status_code == 401
        assert httpx.post(pools, json={}, auth=("somebody", "secret")).json() == []
        assert "<html" in httpx.get(address, follow_redirects=True).text, (
            "the pages are not in the folder they are served from"
        )
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(tiny_recipe(tmp_path, tmp_path / "pairs.jsonl"))
        )
        env = {
            **os.environ,
            "PREFECT_API_URL": f"{address}/api",
            "PREFECT_API_AUTH_STRING": LOCK,
            "LORA_RUNS": str(tmp_path / "runs"),
        }
        command = [str(BIN / "lora"), "deploy", "recipe.yaml", "--cron", "0 2 * * *"]
        deployed = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert deployed.returncode == 0, deployed.stderr
        [pool] = httpx.post(pools, json={}, auth=("somebody", "secret")).json()
        assert (pool["name"], pool["type"]) == ("lora", "process")
        assert COMPOSE["services"]["worker"]["command"][-3:] == [
            pool["name"],
            "--type",
            pool["type"],
        ]


@pytest.mark.skipif(
    find_spec("psycopg2") is None,
    reason="psycopg2, which MLflow needs for Postgres, is not installed",
)
def test_mlflow_accepts_the_host_name_of_the_service(postgres: int, tmp_path: Path) -> None:
    with served("mlflow", postgres, tmp_path) as address:
        until(lambda: httpx.get(f"{address}/health").status_code == 200)
        port = address.rpartition(":")[2]
        search = f"{address}/api/2.0/mlflow/experiments/search"
        query = {"max_results": 10}
        assert (
            httpx.post(search, json=query, headers={"Host": f"mlflow:{port}"}).json()[
                "experiments"
            ][0]["name"]
            == "Default"
        )
        assert (
            httpx.post(search, json=query, headers={"Host": f"elsewhere:{port}"}).status_code == 403
        )
        assert httpx.get(address).status_code == 200
        artifact = f"{address}/api/2.0/mlflow-artifacts/artifacts/0/note.txt"
        assert httpx.put(artifact, content=b"an adapter").status_code == 200
        assert (tmp_path / "artifacts" / "0" / "note.txt").read_bytes() == b"an adapter"
