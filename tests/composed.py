"""The services of infra/compose.yaml without containers: their commands, settings and databases."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

INFRA = Path(__file__).parents[1] / "infra"
SERVERS = INFRA / "servers"
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
BIN = Path(sys.executable).parent
PREFECT_ACCOUNT = "somebody:secret"
SECRETS = {
    "POSTGRES_PASSWORD": "of the administrator",
    "POSTGRES_PREFECT_PASSWORD": "it's prefect's: @/%",
    "POSTGRES_MLFLOW_PASSWORD": "it's mlflow's: @/%",
    "PREFECT_API_AUTH_STRING": PREFECT_ACCOUNT,
    "MLFLOW_ADMIN_PASSWORD": "a password of 20 letters",
    "MLFLOW_SECRET_KEY": "a key for tests",
}
MLFLOW_ADMIN = "admin"
DATABASES = ("prefect", "mlflow", "mlflow_accounts")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until a condition holds; a server that does not answer yet is no error."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (httpx.TransportError, OSError):
            pass
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.5)


def answers(address: str) -> bool:
    return httpx.get(address).status_code == 200


@contextmanager
def started(
    command: Sequence[str], log: Path, env: Mapping[str, str], user: str | None = None
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


@dataclass(frozen=True)
class Postgres:
    """A running server, as its administrator."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What programs such as psql and the scripts of backups read."""
        return {
            **os.environ,
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": COMPOSE["services"]["postgres"]["environment"]["POSTGRES_USER"],
            "PGPASSWORD": SECRETS["POSTGRES_PASSWORD"],
        }

    def psql(
        self, *arguments: str, check: bool = True, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run psql, by default in the database of the administrator."""
        return subprocess.run(
            [postgres_tool("psql"), "--no-psqlrc", "--dbname=postgres", *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    def create_databases(self) -> None:
        """Run the file that the image runs when its folder is empty."""
        self.psql("--quiet", f"--file={SERVERS / 'databases.sql'}", **SECRETS)

    def drop_databases(self) -> None:
        """Remove databases and users."""
        for name in DATABASES:
            self.psql("--command", f"DROP DATABASE {name} WITH (FORCE)")
        for name in ("prefect", "mlflow"):
            self.psql("--command", f"DROP ROLE {name}")


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Run a Postgres with the databases of the compose file."""
    user = "postgres" if os.getuid() == 0 else None  # Postgres refuses to run as root
    initdb, server = map(postgres_tool, ("initdb", "postgres"))
    postgres = Postgres(free_port())
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        (folder / "password").write_text(SECRETS["POSTGRES_PASSWORD"])
        (folder / "password").chmod(0o644)
        made = [initdb, f"--pgdata={folder / 'data'}", f"--pwfile={folder / 'password'}"]
        made += [f"--username={postgres.environment['PGUSER']}", "--auth=scram-sha-256"]
        made += ["--no-sync", "--encoding=UTF8", "--locale=C"]
        subprocess.run(made, user=user, check=True, capture_output=True, cwd=folder)
        listening = ["-D", str(folder / "data"), "-p", str(postgres.port)]
        listening += ["-h", "127.0.0.1", "-k", str(folder), "-c", "fsync=off"]
        with started([server, *listening], folder / "log.txt", postgres.environment, user):
            until(lambda: postgres.psql("--command=SELECT 1", check=False).returncode == 0)
            postgres.create_databases()
            yield postgres
    finally:
        shutil.rmtree(folder)


@contextmanager
def service(
    name: str, postgres: Postgres, state: Path, more: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server of the compose file with a free port and local paths; yield its address.

    Args:
        name: prefect or mlflow.
        postgres: has its databases.
        state: a folder in place of its volume.
        more: other variables.
    """
    described = COMPOSE["services"][name]
    port = str(free_port())
    new = {
        "0.0.0.0": "127.0.0.1",
        {"prefect": "4200", "mlflow": "5000"}[name]: port,
        "/etc/mlflow/accounts.ini": str(state / "accounts.ini"),
        "/state": str(state),
        "postgres:5432": f"127.0.0.1:{postgres.port}",
    }
    accounts = (SERVERS / "accounts.ini").read_text()
    accounts = accounts.replace("postgres:5432", f"127.0.0.1:{postgres.port}")
    (state / "accounts.ini").write_text(accounts)
    plain = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "MLFLOW_"))
    }
    given = {key: _here(value, new) for key, value in described["environment"].items() if value}
    command = [str(BIN / described["command"][0])]
    command += [_here(word, new) for word in described["command"][1:]]
    if name == "mlflow":
        command.append("--workers=1")  # by default there are four, and each imports MLflow
    with started(command, state / f"{name}.txt", plain | given | dict(more or {})):
        yield f"http://127.0.0.1:{port}"


def _here(text: str, new: Mapping[str, str]) -> str:
    """Return a value of the compose file with the secrets and local addresses."""
    for name, secret in SECRETS.items():
        if text.startswith((f"${{{name}}}", f"${{{name}:?")):
            return secret
    text = text.replace("${LORA_HOST:-localhost}", "localhost")
    if "${LORA_ARTIFACTS:?" in text:
        text = text.partition("$")[0] + "/state/artifacts"
    for old, replacement in new.items():
        text = text.replace(old, replacement)
    return text
