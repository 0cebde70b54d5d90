"""Connection to MLflow: a client, and its errors with user, permission and object."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import read_mlflow_creds
from sqlalchemy.exc import SQLAlchemyError

from pipelines.errors import RegistryError, UnreachableError, one_line, without_credentials
from pipelines.paths import tracking_uri
from pipelines.tracking.proxies import foreign_answer, proxy_hint
from pipelines.tracking.runs import configure_mlflow_client, ensure_store

NO_ANSWER = "failed with exception"
"""Part of the error of MLflow's client if it cannot reach a server."""
DENIAL = re.compile(r"error code (401|403)\b|\b(401|403) Client Error")
MODEL_ENDPOINTS = ("registered-models", "model-versions")
MAX_REASON = 300


@dataclass(frozen=True)
class Access:
    """What a request needs at MLflow."""

    permission: Literal["READ", "EDIT", "MANAGE"]
    """MLflow's name of the permission."""
    model: str
    """The registered model."""
    experiment: str
    """The experiment with the runs and files, in words."""
    consequence: str = ""
    """What an error means for the run; empty for nothing."""


READING_ALL = Access("READ", "of any name", "of any name")
"""What reading every registered model needs."""


def reading(name: str) -> Access:
    """Return what reading a registered model needs."""
    return Access("READ", name, f"with the files of {name}")


def editing(name: str) -> Access:
    """Return what a decision about a registered model needs."""
    return Access("EDIT", name, f"with the files of {name}")


@contextmanager
def connect(runs: Path, access: Access) -> Iterator[MlflowClient]:
    """Yield a client; raise MLflow's errors as RegistryError.

    Args:
        runs: folder of all runs; has the SQLite file unless a server is configured.
        access: what the block does.

    Raises:
        UnreachableError: the server does not answer.
        RegistryError: it refuses; the message names the user, the permission and the object if
            that is the reason.
    """
    configure_mlflow_client()
    uri = tracking_uri(runs)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        ensure_store(uri)
        yield MlflowClient()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise _translated(error, uri, access) from error


def _translated(error: Exception, uri: str, access: Access) -> RegistryError:
    text = one_line(error, with_type=False, limit=MAX_REASON)
    foreign = foreign_answer(str(error), uri)
    is_unreachable = isinstance(error, ConnectionError) or NO_ANSWER in text
    kind = UnreachableError if is_unreachable and foreign is None else RegistryError
    reason = foreign or _denial(text, access) or without_credentials(text)
    if kind is UnreachableError:
        reason += proxy_hint(uri)
    consequence = f"; {access.consequence}" if access.consequence else ""
    return kind(f"MLflow at {without_credentials(uri)}: {reason}{consequence}")


def is_denied(error: Exception) -> bool:
    """Return whether MLflow refused a request because the user lacks a permission."""
    return DENIAL.search(str(error)) is not None


def _denial(text: str, access: Access) -> str | None:
    """Return which permission the user lacks; None if that is not the reason."""
    found = DENIAL.search(text)
    if found is None:
        return None
    status = found.group(1) or found.group(2)
    user = read_mlflow_creds().username
    subject = "a request without a user name" if user is None else f"the user {user!r}"
    thing = f"the experiment {access.experiment}"
    if any(endpoint in text for endpoint in MODEL_ENDPOINTS):
        thing = f"the registered model {access.model}"
    wanted = f"{access.permission} access to {thing}"
    if status == "401":
        return (
            f"{subject} is not authenticated (401), which {wanted} requires; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user of the server"
        )
    return (
        f"{subject} has no {wanted} (403); let an administrator grant the permission "
        f"{access.permission}, or use another user"
    )
