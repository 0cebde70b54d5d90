"""A training in MLflow while it runs: nothing twice, nothing lost, and no waiting for a server."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from registered import training_stage

from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.runtime.stage import Stage
from pipelines.tracking import live
from pipelines.tracking.live import live_run
from pipelines.tracking.step_metrics import StepMetrics

mlflow = pytest.importorskip("mlflow")
from mlflow.entities import Run  # noqa: E402

from pipelines.tracking.runs import ensure_store, log_points  # noqa: E402

pytestmark = pytest.mark.server
EXPERIMENT = "pairs"
Row = dict[str, Any]
TrainStage = Stage[TrainInputs, TrainResult]
PHASES = {"data": 0.1, "forward": 0.5, "backward": 0.9, "optimizer": 0.2, "communication": 0.3}
CURVES = {
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/peak_memory_bytes",
    *(f"train/seconds_{phase}" for phase in PHASES),
}


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use a file next to the runs as the store, and send and sample often."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setattr(live, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(live, "MAX_SEND_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; creating its store is slow."""
    folder = tmp_path_factory.mktemp("runs")
    mlflow.MlflowClient(store(folder))
    return folder


def store(runs: Path) -> str:
    return f"sqlite:///{runs / 'mlflow.db'}"


def training_row(step: int, **changes: Any) -> Row:
    row = {
        "step": step,
        "steps": 9,
        "loss": 3 - step / 100,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 207.5,
        "peak_memory_bytes": 10**9,
        "seconds": 2.0,
        "seconds_of": PHASES,
        "time": 1000.0 + 2 * step,
    }
    return row | changes


def print_nothing(text: str) -> None:
    raise AssertionError(text)


def runs_of(client: Any, stage: TrainStage) -> list[Run]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    query = f"tags.`lora.training` = '{stage.key}'"
    return list(client.search_runs([experiment.experiment_id], query))


def run_of(client: Any, stage: TrainStage) -> Run:
    [run] = runs_of(client, stage)
    return run


def steps_of(client: Any, stage: TrainStage, name: str = "train/loss") -> list[int]:
    """Return the steps at which a training's run has a metric, by time; empty without a run."""
    try:
        run = run_of(client, stage)
    except (AttributeError, ValueError):
        return []
    return [point.step for point in client.get_metric_history(run.info.run_id, name)]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.1)


def test_training_is_visible_while_it_runs(runs: Path) -> None:
    client = mlflow.MlflowClient(store(runs))
    stage = training_stage("seen", runs)
    with live_run(stage, EXPERIMENT, print_nothing) as take:
        take(training_row(1))
        wait_until(lambda: steps_of(client, stage) == [1])
        run = run_of(client, stage)
        assert run.info.status == "RUNNING"
        assert run.info.run_name == "rank-4 training"
        wait_until(lambda: len(steps_of(client, stage, "system/cpu_utilization_percentage")) > 1)
        take(training_row(2, grad_norm=None))
    run = run_of(client, stage)
    assert run.info.status == "FINISHED"
    assert steps_of(client, stage) == [1, 2]
    assert steps_of(client, stage, "train/grad_norm") == [1]
    assert run.data.params == {
        "method": "lora",
        "lora.r": "4",
        "lora.alpha": "32",
        "learning_rate": "0.002",
        "quantization": "nf4",
    }
    assert run.data.tags["lora.kind"] == "training"
    assert "lora.stage" not in run.data.tags
    assert {name for name in run.data.metrics if name.startswith("train/")} == CURVES
    assert run.data.metrics["train/seconds_backward"] == 0.9
    assert "system/system_memory_usage_percentage" in run.data.metrics
    assert "system/disk_usage_percentage" in run.data.metrics
    # as after a request whose answer was lost
    log_points(client, run.info.run_id, StepMetrics.model_validate(training_row(1)).points())
    assert steps_of(client, stage) == [1, 2]


def test_resumed_training_logs_no_step_twice(runs: Path) -> None:
    """It is interrupted after step 5, resumes from step 4, and its first rows are read again."""
    client = mlflow.MlflowClient(store(runs))
    stage = training_stage("resumes", runs)
    with pytest.raises(KeyboardInterrupt), live_run(stage, EXPERIMENT, print_nothing) as take:
        for step in range(1, 6):
            take(training_row(step))
        wait_until(lambda: len(steps_of(client, stage)) == 5)
        raise KeyboardInterrupt
    assert run_of(client, stage).info.status == "KILLED"
    resumed_after = 100
    with (
        pytest.raises(ValueError, match="diverged"),
        live_run(stage, EXPERIMENT, print_nothing) as take,
    ):
        for step in range(1, 8):
            pause = resumed_after if step > 4 else 0
            take(training_row(step, time=1000.0 + 2 * step + pause))
        wait_until(lambda: len(steps_of(client, stage)) == 7)
        assert run_of(client, stage).info.status == "RUNNING"
        raise ValueError("diverged")
    assert run_of(client, stage).info.status == "FAILED"
    with live_run(stage, EXPERIMENT, print_nothing) as take:
        take(training_row(8, time=2000.0))
    assert run_of(client, stage).info.status == "FINISHED"
    assert steps_of(client, stage) == list(range(1, 9))


def test_restarted_training_has_a_new_run(runs: Path) -> None:
    stage = training_stage("restarts", runs)
    for loss in (3.0, 2.0):
        with live_run(stage, EXPERIMENT, print_nothing) as take:
            take(training_row(1, loss=loss, time=time.time()))
    found = runs_of(mlflow.MlflowClient(store(runs)), stage)
    # the newest run is first: a comparison links that one
    assert [run.data.metrics["train/loss"] for run in found] == [2.0, 3.0]
    assert [run.info.status for run in found] == ["FINISHED", "FINISHED"]


def test_training_does_not_wait_for_a_server_that_does_not_answer(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server accepts the connection and sends nothing, so that requests time out."""
    printed: list[str] = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(live, "END_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with live_run(training_stage("mute", runs), EXPERIMENT, printed.append) as take:
            started = time.monotonic()
            for step in range(1, 1001):
                take(training_row(step))
            assert time.monotonic() - started < 0.5
            wait_until(lambda: len(printed) == 1)
            ended = time.monotonic()
        assert time.monotonic() - ended < 1.5
        wait_until(lambda: "live metrics" not in [thread.name for thread in threading.enumerate()])
    assert len(printed) == 1
    assert "training continues" in printed[0]


@pytest.mark.slow
def test_server_that_goes_away_and_returns_gets_every_row_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    printed: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = mlflow.MlflowClient(store(runs))
    stage = training_stage("returns", runs)
    with live_run(stage, EXPERIMENT, printed.append) as take:
        take(training_row(1))
        wait_until(lambda: len(printed) == 1)  # the server is away at first
        with served(runs, port):
            wait_until(lambda: steps_of(client, stage) == [1])
        for step in range(2, 300):
            take(training_row(step))
        time.sleep(1)
        assert steps_of(client, stage) == [1]
        with served(runs, port):
            wait_until(lambda: len(steps_of(client, stage)) >= 299)
            take(training_row(300))
            wait_until(lambda: len(steps_of(client, stage)) >= 300)
            assert run_of(client, stage).info.status == "RUNNING"
    assert steps_of(client, stage) == list(range(1, 301))
    assert len(steps_of(client, stage, "train/seconds_backward")) == 300
    assert len(printed) == 1


@contextmanager
def served(runs: Path, port: int) -> Iterator[None]:
    """Run a tracking server until the block ends; kill all of its processes then."""
    command = [str(Path(sys.executable).parent / "mlflow"), "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store(runs)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with (runs / "server.txt").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=runs)
    try:
        yield
    finally:
        process = psutil.Process(server.pid)
        family = [*process.children(recursive=True), process]
        for member in family:
            member.kill()
        server.wait(20)
        psutil.wait_procs(family, timeout=20)


def test_store_is_created_atomically(tmp_path: Path) -> None:
    """A process that is killed while MLflow creates its tables leaves nothing in the way."""
    path = tmp_path / "runs" / "mlflow.db"
    uri = f"sqlite:///{path}"
    code = (
        "from pipelines.tracking.runs import ensure_store; print('started', flush=True); "
        f"ensure_store({uri!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    temporary = ".mlflow.db.*/mlflow.db"
    wait_until(lambda: any(file.stat().st_size for file in path.parent.glob(temporary)))
    process.kill()
    process.communicate()
    assert not path.exists()
    for _ in range(2):  # the second call finds an existing store
        ensure_store(uri)
    assert mlflow.MlflowClient(uri).search_experiments()
    visible = [file.name for file in path.parent.iterdir() if not file.name.startswith(".")]
    assert visible == ["mlflow.db"]
