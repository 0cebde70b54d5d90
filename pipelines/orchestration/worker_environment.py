"""The variables that a deployment passes to its worker: addresses of servers, never secrets."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import without_credentials
from pipelines.orchestration.deploy_options import NOTIFY
from pipelines.paths import runs_root

RUNS = "LORA_RUNS"
TRACKING = "MLFLOW_TRACKING_URI"
FOLDERS = ("HF_HOME", "HF_DATASETS_CACHE")
"""Variables with a folder, which the worker needs under the same path."""
PLAIN = (
    "LORA_REGISTRY_SECONDS",
    "LORA_MAIN_ADDRESS",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)
"""Variables that are copied as they are. A variable that can contain a secret is not listed."""
SECRETS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    NOTIFY,
)
"""Variables that are never copied; the worker needs them in its own environment."""
SQLITE = "sqlite:///"


@dataclass(frozen=True)
class WorkerEnvironment:
    """What the worker's runs get."""

    variables: dict[str, str]
    secrets: tuple[str, ...] = ()
    """Names of variables that are set here and not stored: the worker needs them in its own
    environment."""


def worker_environment(environment: Mapping[str, str] = os.environ) -> WorkerEnvironment:
    """Return the addresses that are set here; one with a password counts as a secret.

    Args:
        environment: of the process that deploys; `tracking_account` has moved the account of an
            MLflow server from its address to other variables.
    """
    variables = {RUNS: str(runs_root())}
    secrets = [name for name in SECRETS if environment.get(name)]
    for name in (TRACKING, *FOLDERS, *PLAIN):
        value = environment.get(name, "")
        if without_credentials(value) != value:
            secrets.append(name)
        elif value:
            variables[name] = _for_worker(name, value)
    return WorkerEnvironment(variables, tuple(secrets))


def can_be_shown(name: str) -> bool:
    """Return whether a variable has an address or a folder, whose value may be printed."""
    return name in (RUNS, TRACKING, *FOLDERS, *PLAIN)


def _for_worker(name: str, value: str) -> str:
    """Return a value that is the same in the worker's working folder."""
    if name == TRACKING:
        return _absolute(value)
    if name in FOLDERS:
        return str(Path(value).expanduser().absolute())
    return value


def _absolute(uri: str) -> str:
    """Return an address; a relative SQLite file as an absolute one."""
    path = uri.removeprefix(SQLITE)
    if path == uri or path.startswith("/"):
        return uri
    return f"{SQLITE}{Path(path).absolute()}"
