"""What a registration needs is checked before training, and the check leaves nothing behind."""

import gc
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registered import configure_store, register, runs_with_store
from summaries import Summary

from pipelines.errors import RecipeError, RegistryError, UnreachableError

mlflow = pytest.importorskip("mlflow")
from mlflow import MlflowClient  # noqa: E402

from pipelines.tracking.preflight import (  # noqa: E402
    check_access,
    check_adapter_sizes,
    check_experiment_name,
)

pytestmark = pytest.mark.usefixtures("own_store")
PROXY = """
import http.server, sys

class Proxy(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = b"<html><body>Ask your administrator</body></html>"
        self.send_response(int(sys.argv[1]))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_CONNECT = answer

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Send all requests through a proxy that answers them itself, with the parameter's status."""
    command = [sys.executable, "-c", PROXY, str(request.param)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = f"127.0.0.1:{process.stdout.readline().strip()}"
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://anna:planted@{address}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield f"http://{address}"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("proxy", "scheme"), [(200, "http"), (403, "http"), (407, "https")], indirect=["proxy"]
)
def test_the_answer_of_a_proxy_is_not_that_of_the_server(
    proxy: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://mlflow.example")
    with pytest.raises(RegistryError, match=r"set NO_PROXY=mlflow\.example") as refused:
        check_access("name", "name", tmp_path)
    assert proxy in str(refused.value)
    assert "planted" not in str(refused.value)
    assert "run again" not in str(refused.value)
    assert not isinstance(refused.value, UnreachableError)


@pytest.mark.parametrize(
    "name", ["", " padded", "a\tb", "two\nlines", "n" * 501, "../out", "a/../../b"]
)
def test_an_experiment_that_cannot_have_its_name_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"registry\.experiment .*choose another"):
        check_experiment_name(name)


@pytest.mark.parametrize("name", ["plain", "team/task", "n" * 500, "dots..inside", "ä b"])
def test_mlflow_accepts_the_names_that_are_not_refused(
    name: str, runs: Path, tmp_path: Path
) -> None:
    configure_store(runs)
    check_experiment_name(name)
    assert MlflowClient().create_experiment(name, artifact_location=tmp_path.as_uri())


def test_an_adapter_near_the_size_of_the_base_is_refused_with_the_others_named() -> None:
    check_adapter_sizes({"rank-4": 1_000_000}, 1_000_000)
    with pytest.raises(RecipeError, match="rank-64 with 1,500,000 bytes would be near") as refused:
        check_adapter_sizes({"rank-4": 90_000, "rank-64": 1_500_000}, 1_000_000)
    assert "rank-4 " not in str(refused.value)
    assert "at most 1,000,000 bytes" in str(refused.value)
    assert "by a factor of 1.5" in str(refused.value)


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    runs = runs_with_store(tmp_path_factory)
    configure_store(runs)
    check_access("name", "deleted", runs)
    client = MlflowClient()
    number = client.create_experiment("deleted", artifact_location=(runs / "files").as_uri())
    check_access("name", "deleted", runs)
    client.delete_experiment(number)
    with pytest.raises(RegistryError, match=f"experiments restore --experiment-id {number}"):
        check_access("name", "deleted", runs)


def test_a_folder_of_files_that_cannot_be_written_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    runs = runs_with_store(tmp_path_factory)
    configure_store(runs)
    client = MlflowClient()
    # no user can write to /proc, not even the one of a container
    client.create_experiment("away", artifact_location="file:///proc/elsewhere")
    with pytest.raises(RegistryError, match="this user cannot write to /proc"):
        check_access("name", "away", runs)


def test_checking_a_local_store_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    runs = runs_with_store(tmp_path_factory)
    configure_store(runs)
    client = MlflowClient()
    client.create_registered_model("known")
    client.set_registered_model_tag("known", "kept", "1")
    client.create_experiment("known", artifact_location=(runs / "files").as_uri())
    for name in ("known", "new"):
        check_access(name, name, runs)
    [model] = client.search_registered_models()
    assert (model.name, model.tags) == ("known", {"kept": "1"})
    experiments = client.search_experiments(view_type=mlflow.entities.ViewType.ALL)
    assert sorted(one.name for one in experiments) == ["Default", "known"]
    assert client.get_experiment_by_name("known").tags == {}
    assert [path.name for path in runs.iterdir()] == ["mlflow.db"]


def test_a_failed_registration_leaves_no_run_in_progress_and_can_be_repeated(
    comparison: Summary, runs: Path
) -> None:
    configure_store(runs)
    records = Path(comparison["items"]["rank-16"])
    hidden = records.with_name("hidden")
    shutil.move(records, hidden)
    with pytest.raises((RegistryError, OSError)):
        register(comparison, runs)
    assert set(states(comparison)) == {"FINISHED", "FAILED"}
    shutil.move(hidden, records)
    register(comparison, runs)
    assert set(states(comparison)) == {"FINISHED"}


def states(comparison: Summary) -> list[str]:
    """Return the status of each run of a comparison's experiment."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(comparison["name"])
    return [run.info.status for run in client.search_runs([experiment.experiment_id])]


@pytest.mark.server
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)
def test_the_files_of_a_server_are_checked_and_removed(
    start_server: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "files"
    address = start_server("--artifacts-destination", str(files))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    client = MlflowClient(address)
    number = client.create_experiment("known")
    started = time.monotonic()
    check_access("name", "known", tmp_path)
    check_access("name", "new", tmp_path)
    assert time.monotonic() - started < 10
    assert not [path for path in files.rglob("*") if path.is_file()]
    assert client.search_registered_models() == []
    (files / number).rmdir()
    (files / number).write_text("a file in place of the folder")
    with pytest.raises(RegistryError, match="cannot be written to and read from mlflow-artifacts"):
        check_access("name", "known", tmp_path)
    gc.collect()  # MLflow leaves the connection of a refused request to the collector
