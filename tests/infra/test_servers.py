"""The servers of the compose file run without containers, on a Postgres with their databases."""

import os
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import yaml
from composed import (
    BIN,
    COMPOSE,
    MLFLOW_ADMIN,
    PREFECT_ACCOUNT,
    SECRETS,
    Postgres,
    answers,
    free_port,
    postgres_server,
    service,
    started,
    until,
)
from tiny import tiny_recipe

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize(
    ("user", "database", "is_allowed"),
    [("prefect", "prefect", True), ("prefect", "mlflow", False), ("mlflow", "prefect", False)],
)
def test_each_service_has_its_own_databases(
    postgres: Postgres, user: str, database: str, is_allowed: bool
) -> None:
    password = SECRETS[f"POSTGRES_{user.upper()}_PASSWORD"]
    query = [f"--dbname={database}", "--command=CREATE TABLE one (id int)"]
    ended = postgres.psql(*query, check=False, PGUSER=user, PGPASSWORD=password)
    assert (ended.returncode == 0) == is_allowed
    if is_allowed:
        postgres.psql(f"--dbname={database}", "--command=DROP TABLE one")
    else:
        assert "permission denied for database" in ended.stderr


def test_prefect_requires_the_password_and_the_worker_is_healthy(
    postgres: Postgres, tmp_path: Path
) -> None:
    account = tuple(PREFECT_ACCOUNT.split(":"))
    with service("prefect", postgres, tmp_path) as address:
        until(lambda: answers(f"{address}/api/health"))
        pools = f"{address}/api/work_pools/filter"
        assert httpx.post(pools, json={}).status_code == 401
        assert httpx.post(pools, json={}, auth=account).json() == []
        assert "<html" in httpx.get(address, follow_redirects=True).text, (
            "the pages are not in the folder they are served from"
        )
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(tiny_recipe(tmp_path, tmp_path / "pairs.jsonl"))
        )
        health = free_port()
        env = {
            **os.environ,
            "PREFECT_API_URL": f"{address}/api",
            "PREFECT_API_AUTH_STRING": PREFECT_ACCOUNT,
            "PREFECT_HOME": str(tmp_path / "home"),
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_WORKER_WEBSERVER_PORT": str(health),
            "LORA_RUNS": str(tmp_path / "runs"),
        }
        command = [str(BIN / "lora"), "deploy", "recipe.yaml", "--cron", "0 2 * * *"]
        deployed = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert deployed.returncode == 0, deployed.stderr
        [pool] = httpx.post(pools, json={}, auth=account).json()
        worker = COMPOSE["services"]["worker"]["command"]
        assert worker[3:7] == ["--pool", pool["name"], "--type", pool["type"]]
        with started([str(BIN / worker[0]), *worker[1:]], tmp_path / "worker.txt", env):
            until(lambda: answers(f"http://127.0.0.1:{health}/health"))


@pytest.mark.skipif(
    find_spec("psycopg2") is None,
    reason="psycopg2, which MLflow needs for Postgres, is not installed",
)
def test_mlflow_accepts_its_users_and_the_host_name_of_the_service(
    postgres: Postgres, tmp_path: Path
) -> None:
    account = (MLFLOW_ADMIN, SECRETS["MLFLOW_ADMIN_PASSWORD"])
    with service("mlflow", postgres, tmp_path) as address:
        until(lambda: answers(f"{address}/health"))
        port = address.rpartition(":")[2]
        search = f"{address}/api/2.0/mlflow/experiments/search"
        query = {"max_results": 10}
        named = {"Host": f"mlflow:{port}"}
        assert httpx.post(search, json=query).status_code == 401
        found = httpx.post(search, json=query, headers=named, auth=account).json()
        assert found["experiments"][0]["name"] == "Default"
        elsewhere = {"Host": f"elsewhere:{port}"}
        assert httpx.post(search, json=query, headers=elsewhere, auth=account).status_code == 403
        artifact = f"{address}/api/2.0/mlflow-artifacts/artifacts/0/note.txt"
        assert httpx.put(artifact, content=b"an adapter").status_code == 401
        assert httpx.put(artifact, content=b"an adapter", auth=account).status_code == 200
        assert (tmp_path / "artifacts" / "0" / "note.txt").read_bytes() == b"an adapter"
