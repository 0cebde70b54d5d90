"""Refused requests name user, permission and object, on an MLflow server with accounts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from mlflow_accounts import ADMIN, ADMIN_PASSWORD, SERVER_OPTIONS, server_environment
from registered import register
from summaries import Summary

from pipelines.errors import RegistryError, UnreachableError

mlflow = pytest.importorskip("mlflow")
from mlflow.exceptions import MlflowException  # noqa: E402

from pipelines.tracking.connection import Access, connect  # noqa: E402
from pipelines.tracking.registry import fetch_champion  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]
READER = "reader"
DENIED = "API request to endpoint /api/2.0/mlflow/{0} failed with error code {1} != 200."


@pytest.fixture(scope="module")
def accounts(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a server with accounts, which has the user READER."""
    pytest.importorskip("flask_wtf", reason="MLflow's accounts need mlflow[auth]")
    folder = tmp_path_factory.mktemp("accounts")
    address = start_server(*SERVER_OPTIONS, environment=server_environment(folder))
    requests.post(
        f"{address}/api/2.0/mlflow/users/create",
        json={"username": READER, "password": ADMIN_PASSWORD},
        auth=(ADMIN, ADMIN_PASSWORD),
        timeout=60,
    ).raise_for_status()
    return address


def log_in(patch: pytest.MonkeyPatch, user: str, password: str = ADMIN_PASSWORD) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", user)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def test_denied_access_names_user_permission_and_object(
    accounts: str, comparison: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = comparison["name"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", accounts)
    log_in(monkeypatch, ADMIN)
    admin = mlflow.MlflowClient(accounts)
    admin.create_registered_model(name)
    admin.create_experiment(name)
    assert fetch_champion(name, tmp_path, tmp_path) is None
    log_in(monkeypatch, READER)
    expected = f"the user 'reader' has no READ access to the registered model {name} .403."
    with pytest.raises(RegistryError, match=expected):
        fetch_champion(name, tmp_path, tmp_path)
    expected = f"the user 'reader' has no EDIT access to the experiment {name} .403."
    with pytest.raises(RegistryError, match=expected):
        register(comparison, tmp_path)
    log_in(monkeypatch, READER, "wrong")
    expected = f"the user 'reader' is not authenticated .401., .* registered model {name} requires"
    with pytest.raises(RegistryError, match=expected):
        fetch_champion(name, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            MlflowException(DENIED.format("registered-models/get", 403)),
            "the user 'reader' has no EDIT access to the registered model NAME (403)",
        ),
        (
            MlflowException(DENIED.format("runs/create", 403)),
            "the user 'reader' has no EDIT access to the experiment RUNS (403)",
        ),
        (
            OSError("403 Client Error: FORBIDDEN for url: http://host/api/2.0/mlflow-artifacts/a"),
            "the user 'reader' has no EDIT access to the experiment RUNS (403)",
        ),
        (
            MlflowException(DENIED.format("model-versions/create", 401)),
            "which EDIT access to the registered model NAME requires",
        ),
        (MlflowException("disk full"), ": disk full"),
    ],
)
def test_error_has_its_reason_and_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    log_in(monkeypatch, READER)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:hidden@host:5000")
    with (
        pytest.raises(RegistryError) as found,
        connect(tmp_path, Access("EDIT", "NAME", "RUNS", "run again")),
    ):
        raise error
    text = str(found.value)
    assert expected in text
    assert text.startswith("MLflow at http://host:5000: ")
    assert text.endswith("; run again")
    assert "hidden" not in text
    assert not isinstance(found.value, UnreachableError)
