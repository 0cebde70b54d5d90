"""The compose file and the image: valid settings, connected services, and no open ports."""

import fnmatch
import os
import re
import shutil
import subprocess
from configparser import ConfigParser
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
    required = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    env = {**os.environ, **dict.fromkeys(required, "name:secret")}
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


def test_mlflow_has_accounts_without_default_rights_and_files_in_a_bucket(
    services: dict[str, Service],
) -> None:
    settings = ConfigParser()
    settings.read(COMPOSE.parent / "servers" / "accounts.ini")
    assert settings["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert "admin_password" not in settings["mlflow"]
    assert settings["mlflow"].getint("auth_cache_ttl_seconds") > 0
    assert option(services["mlflow"], "app-name") == "basic-auth"
    assert option(services["mlflow"], "artifacts-destination").startswith("${LORA_ARTIFACTS:?")
    environment = services["mlflow"]["environment"]
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(environment)
    [accounts] = services["mlflow"]["configs"]
    assert accounts["target"] == environment["MLFLOW_AUTH_CONFIG_PATH"]


def test_every_file_of_the_compose_file_exists() -> None:
    configs = yaml.safe_load(COMPOSE.read_text())["configs"]
    for config in configs.values():
        assert (COMPOSE.parent / config["file"]).is_file()
    used = {
        one["source"]
        for service in yaml.safe_load(COMPOSE.read_text())["services"].values()
        for one in service.get("configs", [])
    }
    assert used == set(configs)


def test_proxy_is_the_only_way_in_and_forwards_to_both_servers(
    services: dict[str, Service],
) -> None:
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    text = (COMPOSE.parent / "servers" / "Caddyfile").read_text()
    assert set(re.findall(r"reverse_proxy (\S+)", text)) == {"mlflow:5000", "prefect:4200"}
    assert text.count("tls {$LORA_TLS:internal}") == len(re.findall(r"^https://", text, re.M))
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("caddy, which checks its configuration, is not installed")
    command = [caddy, "validate", "--adapter", "caddyfile", "--config"]
    read = subprocess.run(
        [*command, str(COMPOSE.parent / "servers" / "Caddyfile")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert read.returncode == 0, read.stderr


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


def test_each_server_has_its_own_user_and_databases(services: dict[str, Service]) -> None:
    sql = (COMPOSE.parent / "servers" / "databases.sql").read_text()
    owners = dict(re.findall(r"CREATE DATABASE (\w+) OWNER (\w+);", sql))
    assert owners == {"prefect": "prefect", "mlflow": "mlflow", "mlflow_accounts": "mlflow"}
    accounts = ConfigParser()
    accounts.read(COMPOSE.parent / "servers" / "accounts.ini")
    addresses = {
        "prefect": [
            services["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"],
        ],
        "mlflow": [
            services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"],
            accounts["mlflow"]["database_uri"],
        ],
    }
    found = {}
    for service, uris in addresses.items():
        for uri in map(urlsplit, uris):
            assert (uri.username, uri.password, uri.hostname) == (service, None, "postgres")
            found[uri.path.removeprefix("/")] = service
        assert services[service]["environment"]["PGPASSWORD"].startswith("${")
    assert found == owners


def test_worker_gets_the_secrets_of_its_runs_from_the_shell(services: dict[str, Service]) -> None:
    environment = services["worker"]["environment"]
    names = ("HF_TOKEN", "LORA_NOTIFY_URL", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    assert dict.fromkeys(names).items() <= environment.items()


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
        published = service.get("ports", [])
        assert all(port.startswith("${LORA_BIND:-127.0.0.1}:") for port in published)
    for name in re.findall(r"\$\{(\w*(?:PASSWORD|AUTH|KEY)\w*):?-", COMPOSE.read_text()):
        pytest.fail(f"{name} has a default")


def test_image_uses_the_versions_of_the_constraints() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"\S+://\S+", text) == ["https://download.pytorch.org/whl/cpu"]
    for source in re.findall(r"^COPY (?!\. )(.+) \S+$", text, flags=re.MULTILINE):
        for name in source.split():
            assert (REPOSITORY / name).is_file(), name
    constrained = {
        line.partition("==")[0].lower()
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    installed = re.findall(r"pip install --constraint \S+(?: --index-url \S+)? ([^&\\\n]+)", text)
    assert len(installed) == 4
    for words in installed:
        for word in words.split():
            assert word == "." or "==" in word or word in constrained, f"{word} has no version"


def test_images_of_others_are_pinned_by_digest(services: dict[str, Service]) -> None:
    own = {"lora-servers:0.1.0", "lora-pipeline:0.1.0"}
    images = {service["image"] for service in services.values()} - own
    images |= set(re.findall(r"^FROM (\S+:\S+)", DOCKERFILE.read_text(), re.M))
    assert len(images) == 3
    for image in images:
        assert re.fullmatch(r"\w+:[\w.-]+@sha256:[0-9a-f]{64}", image), image
    variants = set(re.findall(r"^FROM \S+ AS torch-(\w+)", DOCKERFILE.read_text(), re.M))
    assert variants == {"cuda", "cpu"}
    assert services["worker"]["build"]["args"] == {"VARIANT": "cuda"}


def test_worker_reports_its_health(services: dict[str, Service]) -> None:
    worker = services["worker"]
    assert "--with-healthcheck" in worker["command"]
    assert worker["environment"]["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"
    assert "http://localhost:8080/health" in worker["healthcheck"]["test"][-1]


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
