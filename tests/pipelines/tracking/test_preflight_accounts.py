"""The checks before training, on a server with accounts and with moto's S3 server."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow_accounts import ADMIN, ADMIN_PASSWORD, SERVER_OPTIONS, server_environment

from pipelines.console import console
from pipelines.errors import RegistryError

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("flask_wtf", reason="MLflow's accounts need mlflow[auth]")
boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server", reason="the S3 server is that of moto[s3]")
from mlflow import MlflowClient  # noqa: E402

from pipelines.tracking.accounts import Accounts, Level  # noqa: E402
from pipelines.tracking.preflight import check_access  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]
BUCKET = "adapters"


@dataclass(frozen=True)
class Team:
    """An MLflow server with the users admin, reader, trainer and stranger, and an S3 server."""

    address: str
    files: Path
    """Folder of the files that MLflow's server stores."""
    bucket: Any

    def leftovers(self) -> list[str]:
        """Return what checks left in the stores of files."""
        stored = [str(path) for path in self.files.rglob("*") if path.is_file()]
        return stored + [one.key for one in self.bucket.objects.all()]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with one bucket."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def team(
    start_server: Callable[..., str], s3: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Team]:
    """The servers; `name` is a registered model, `proxied` and `direct` are experiments."""
    folder = tmp_path_factory.mktemp("accounts")
    files = folder / "files"
    options = [*SERVER_OPTIONS, "--artifacts-destination", str(files)]
    address = start_server(*options, environment=server_environment(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_S3_ENDPOINT_URL", s3)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        bucket = boto3.resource("s3", endpoint_url=s3).create_bucket(Bucket=BUCKET)
        found = Team(address, files, bucket)
        log_in(patch, found, ADMIN)
        create_objects(address)
        yield found
        bucket.meta.client.close()


def create_objects(address: str) -> None:
    client = MlflowClient(address, address)
    client.create_registered_model("name")
    experiments = [
        client.create_experiment("proxied"),
        client.create_experiment("direct", artifact_location=f"s3://{BUCKET}/direct"),
    ]
    accounts = Accounts(address)
    accounts.create_user("stranger", ADMIN_PASSWORD)
    levels: dict[str, Level] = {"reader": "READ", "trainer": "EDIT"}
    for user, level in levels.items():
        accounts.create_user(user, ADMIN_PASSWORD)
        role = accounts.create_role(user, "")
        accounts.add_permission(role, "registered_model", "name", level)
        for experiment in experiments:
            accounts.add_permission(role, "experiment", experiment, level)
        accounts.assign(user, role)


def log_in(patch: pytest.MonkeyPatch, team: Team, user: str) -> None:
    """Make the team's server that of every client, with an account."""
    patch.setenv("MLFLOW_TRACKING_URI", team.address)
    patch.setenv("MLFLOW_TRACKING_USERNAME", user)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN_PASSWORD)


@pytest.mark.parametrize("user", [ADMIN, "trainer"])
@pytest.mark.parametrize("experiment", ["proxied", "direct"])
def test_a_user_who_may_write_passes_and_leaves_nothing(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, experiment: str
) -> None:
    log_in(monkeypatch, team, user)
    check_access("name", experiment, tmp_path)
    check_access("new", experiment, tmp_path)
    assert team.leftovers() == []
    log_in(monkeypatch, team, ADMIN)
    client = MlflowClient(team.address, team.address)
    assert [model.name for model in client.search_registered_models()] == ["name"]
    assert client.get_registered_model("name").tags == {}
    assert client.get_experiment_by_name(experiment).tags == {}


@pytest.mark.parametrize(
    ("user", "model", "expected"),
    [
        ("reader", "name", "'reader' has no EDIT access to the registered model name .403."),
        ("reader", "new", "'reader' has no EDIT access to the experiment proxied .403."),
        ("stranger", "name", "'stranger' has no EDIT access to the registered model name .403."),
    ],
)
def test_a_user_who_may_not_write_is_refused(
    team: Team,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    user: str,
    model: str,
    expected: str,
) -> None:
    log_in(monkeypatch, team, user)
    with pytest.raises(RegistryError, match=expected):
        check_access(model, "proxied", tmp_path)
    assert team.leftovers() == []


def test_a_new_experiment_is_checked_as_far_as_the_user_can_see(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user, is_unknown in ((ADMIN, False), ("trainer", True)):
        log_in(monkeypatch, team, user)
        with console.capture() as shown:
            check_access("name", "new", tmp_path)
        assert ("when it has its first run" in " ".join(shown.get().split())) == is_unknown


def test_missing_boto3_is_named_with_its_package(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, team, "trainer")
    monkeypatch.setitem(sys.modules, "boto3", None)
    # MLflow keeps its clients by address, so that it imports boto3 for another one
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RegistryError, match=r"package boto3 is missing.*lora-pipeline\[s3\]"):
        check_access("name", "direct", tmp_path)


def test_a_missing_bucket_is_refused_with_the_reason_of_the_store(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, team, ADMIN)
    client = MlflowClient(team.address, team.address)
    client.create_experiment("elsewhere", artifact_location="s3://no-such-bucket/files")
    with pytest.raises(RegistryError, match=r"s3://no-such-bucket/files.*NoSuchBucket"):
        check_access("name", "elsewhere", tmp_path)
