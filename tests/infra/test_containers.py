"""The compose file and the image: valid settings, connected services, and no open ports."""

import fnmatch
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from pipelines.runtime.launcher import GRACE_SECONDS

REPOSITORY = Path(__file__).parents[2]
COMPOSE = REPOSITORY / "infra" / "compose.yaml"
DOCKERFILE = REPOSITORY / "infra" / "docker" / "Dockerfile"
Service = dict[str, Any]


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def option(service: Service, name: str) -> str:
    """Return a `--name=value` of a service's command."""
    [value] = [
        word.partition("=")[2] for word in service["command"] if word.startswith(f"--{name}=")
    ]
    return str(value)


def test_compose_file_is_valid() -> None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and subprocess.run([*command, "version"], capture_output=True, check=False).returncode
            == 0
        ):
            break
    else:
        pytest.skip("docker compose is not installed")
    env = {**os.environ, "POSTGRES_PASSWORD": "secret", "PREFECT_API_AUTH_STRING": "name:secret"}
    read = subprocess.run(
        [*command, "--file", str(COMPOSE), "config", "--quiet"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.returncode == 0, read.stderr


def test_every_prefect_setting_exists(services: dict[str, Service]) -> None:
    import prefect.settings

    names = {
        name
        for service in services.values()
        for name in service.get("environment", {})
        if name.startswith("PREFECT_")
    }
    assert {"PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"} <= names
    for name in names:
        assert getattr(prefect.settings, name).name == name  # raises for an unknown setting


def test_prefect_server_needs_a_password_sends_no_analytics_and_keeps_leases_after_a_restart(
    services: dict[str, Service],
) -> None:
    environment = services["prefect"]["environment"]
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["PREFECT_SERVER_API_AUTH_STRING"].startswith("${PREFECT_API_AUTH_STRING:?")
    assert environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith(".filesystem")
    assert find_spec(environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]) is not None
    state = environment["PREFECT_HOME"]
    assert f"prefect:{state}" in services["prefect"]["volumes"]
    assert environment["PREFECT_SERVER_UI_STATIC_DIRECTORY"].startswith(f"{state}/")


@pytest.mark.filterwarnings("ignore:.*inferred as AnyType:UserWarning")  # raised by MLflow itself
def test_mlflow_accepts_the_worker_and_has_every_option(services: dict[str, Service]) -> None:
    from mlflow.cli import cli
    from mlflow.server.security_utils import get_default_allowed_hosts, is_allowed_host_header

    known = {name for parameter in cli.commands["server"].params for name in parameter.opts}
    assert {
        word.partition("=")[0] for word in services["mlflow"]["command"] if word.startswith("--")
    } <= known
    host = urlsplit(services["worker"]["environment"]["MLFLOW_TRACKING_URI"]).netloc
    allowed = option(services["mlflow"], "allowed-hosts").split(",")
    assert not is_allowed_host_header(get_default_allowed_hosts(), host), (
        "the option is unnecessary"
    )
    for one in (host, "localhost:5000"):
        assert is_allowed_host_header(allowed, one)


def test_worker_has_the_addresses_of_the_servers(services: dict[str, Service]) -> None:
    environment = services["worker"]["environment"]
    mlflow, prefect = (
        urlsplit(environment["MLFLOW_TRACKING_URI"]),
        urlsplit(environment["PREFECT_API_URL"]),
    )
    assert (mlflow.hostname, str(mlflow.port)) == ("mlflow", option(services["mlflow"], "port"))
    assert (prefect.hostname, str(prefect.port), prefect.path) == (
        "prefect",
        services["prefect"]["command"][-1],
        "/api",
    )
    databases = set(
        re.findall(
            r"CREATE DATABASE (\w+);",
            yaml.safe_load(COMPOSE.read_text())["configs"]["databases"]["content"],
        )
    )
    prefect_store = urlsplit(
        services["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
        .replace("${", "")
        .replace("}", "")
    )
    mlflow_store = urlsplit(
        services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
        .replace("${", "")
        .replace("}", "")
    )
    assert {prefect_store.path, mlflow_store.path} == {f"/{name}" for name in databases}
    assert {prefect_store.hostname, mlflow_store.hostname} == {"postgres"}


def test_worker_has_the_gpus_and_the_time_to_stop(services: dict[str, Service]) -> None:
    worker = services["worker"]
    [device] = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert int(worker["stop_grace_period"].removesuffix("s")) > GRACE_SECONDS
    assert worker["environment"]["LORA_RUNS"] == "/runs"
    assert "runs:/runs" in worker["volumes"]


def test_every_port_is_on_localhost_only_and_no_password_has_a_default(
    services: dict[str, Service],
) -> None:
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    for name in re.findall(r"\$\{(\w*(?:PASSWORD|AUTH)\w*):?-", COMPOSE.read_text()):
        pytest.fail(f"{name} has a default")


def test_image_uses_the_versions_of_the_constraints() -> None:
    text = DOCKERFILE.read_text()
    assert "://" not in text
    for source in re.findall(r"^COPY (?!\. )(.+) \S+$", text, flags=re.MULTILINE):
        for name in source.split():
            assert (REPOSITORY / name).is_file(), name
    constrained = {
        line.partition("==")[0].lower()
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for words in re.findall(r"pip install --constraint \S+ ([^&\\\n]+)", text):
        for word in words.split():
            assert word == "." or "==" in word or word in constrained, f"{word} has no version"


def test_image_contains_every_tracked_file() -> None:
    """Otherwise each report from the image would mark its commit as changed."""
    ignored = [
        line.strip()
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
        if line[0] != "#"
    ]
    for line in (REPOSITORY / ".gitignore").read_text().split():
        assert {line.rstrip("/"), f"**/{line.rstrip('/')}"} & set(ignored), (
            f"{line} would be copied into the image"
        )
    known = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    patterns = [pattern.removeprefix("**/") for pattern in ignored]
    left_out = [
        path
        for path in known
        if any(fnmatch.fnmatch(part, pattern) for part in Path(path).parts for pattern in patterns)
    ]
    assert left_out == []
