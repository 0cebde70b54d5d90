"""A training that is told to MLflow while it goes on: nothing twice, nothing lost, and nobody waits for a server."""

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

from pipelines.runtime.stage import Stage
from pipelines.tracking import live, logged
from pipelines.tracking.live import live_run

mlflow = pytest.importorskip("mlflow")
from mlflow.entities import Run  # noqa: E402

from pipelines.tracking.runs import log_points, make_store  # noqa: E402

pytestmark = pytest.mark.server
EXPERIMENT = "pairs"
Row = dict[str, Any]
PHASES = {"data": 0.1, "forward": 0.5, "backward": 0.9, "optimizer": 0.2, "communication": 0.3}


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the store be a file beside the runs, and send and sample often."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setattr(live, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(live, "LONGEST_PAUSE", 0.5)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs; making its store takes long."""
    folder = tmp_path_factory.mktemp("runs")
    mlflow.MlflowClient(store(folder))
    return folder


def store(runs: Path) -> str:
    return f"sqlite:///{runs / 'mlflow.db'}"


def stage(runs: Path, name: str) -> Stage:
    inputs = {
        "method": "lora",
        "rank": 4,
        "lora": {"alpha": 32.0},
        "learning_rate": 0.002,
        "quantization": "nf4",
        "of": name,
    }
    return Stage("train", "rank-4", inputs, runs)


def row(step: int, **changes: Any) -> Row:
    figures = {
        "loss": 3 - step / 100,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 207.5,
        "peak_memory_bytes": 10**9,
    }
    return {
        "step": step,
        "steps": 9,
        **figures,
        "seconds": 2.0,
        "seconds_of": PHASES,
        "time": 1000.0 + 2 * step,
        **changes,
    }


def silent(text: str) -> None:
    raise AssertionError(text)


def run_of(client: Any, one: Stage) -> Run:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    [found] = client.search_runs([experiment.experiment_id], f"tags.`lora.training` = '{one.key}'")
    return found


def steps_of(client: Any, one: Stage, name: str = "train/loss") -> list[int]:
    """Return the steps of which the run of a training has a metric, in the order of their times; none before there is a run."""
    try:
        return [
            point.step for point in client.get_metric_history(run_of(client, one).info.run_id, name)
        ]
    except (AttributeError, ValueError):
        return []


def until(claim: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.1)


def test_a_training_is_seen_while_it_goes_on(runs: Path) -> None:
    client, one = mlflow.MlflowClient(store(runs)), stage(runs, "seen")
    with live_run(one, EXPERIMENT, silent) as take:
        take(row(1))
        until(lambda: steps_of(client, one) == [1])
        run = run_of(client, one)
        assert (run.info.status, run.info.run_name) == ("RUNNING", "rank-4 training")
        until(lambda: len(steps_of(client, one, "system/cpu_utilization_percentage")) > 1)
        take(row(2, grad_norm=None))
    run = run_of(client, one)
    assert (run.info.status, steps_of(client, one), steps_of(client, one, "train/grad_norm")) == (
        "FINISHED",
        [1, 2],
        [1],
    )
    assert run.data.params == {
        "method": "lora",
        "lora.r": "4",
        "lora.alpha": "32",
        "learning_rate": "0.002",
        "quantization": "nf4",
    }
    assert run.data.tags["lora.kind"] == "training" and "lora.stage" not in run.data.tags
    figures = {
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "peak_memory_bytes",
        *(f"seconds_{name}" for name in PHASES),
    }
    assert {name for name in run.data.metrics if name.startswith("train/")} == {
        f"train/{name}" for name in figures
    }
    assert run.data.metrics["train/seconds_backward"] == 0.9
    log_points(
        client, run.info.run_id, logged.points(row(1))
    )  # as where a server took it and its answer was lost
    assert steps_of(client, one) == [1, 2]
    assert {
        "system/system_memory_usage_percentage",
        "system/disk_usage_percentage",
    } <= run.data.metrics.keys()


def test_a_training_that_goes_on_tells_no_step_twice(runs: Path) -> None:
    """It was broken off after step 5, goes on from the checkpoint of step 4, and its first rows are read again."""
    client, one = mlflow.MlflowClient(store(runs)), stage(runs, "goes on")
    with pytest.raises(KeyboardInterrupt), live_run(one, EXPERIMENT, silent) as take:
        for step in range(1, 6):
            take(row(step))
        until(lambda: len(steps_of(client, one)) == 5)
        raise KeyboardInterrupt
    assert run_of(client, one).info.status == "KILLED"
    with pytest.raises(ValueError, match="diverged"), live_run(one, EXPERIMENT, silent) as take:
        for step in range(1, 8):
            take(row(step, time=1000.0 + 2 * step + (100 if step > 4 else 0)))
        until(lambda: len(steps_of(client, one)) == 7)
        assert run_of(client, one).info.status == "RUNNING"
        raise ValueError("diverged")
    assert run_of(client, one).info.status == "FAILED"
    with live_run(one, EXPERIMENT, silent) as take:
        take(row(8, time=2000.0))
    assert run_of(client, one).info.status == "FINISHED"
    assert steps_of(client, one) == list(range(1, 9))


def test_a_training_that_begins_anew_has_a_run_of_its_own(runs: Path) -> None:
    one = stage(runs, "anew")
    for loss in (3.0, 2.0):
        with live_run(one, EXPERIMENT, silent) as tell:
            tell(row(1, loss=loss, time=time.time()))
    client = mlflow.MlflowClient(store(runs))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs([experiment.experiment_id], f"tags.`lora.training` = '{one.key}'")
    assert [run.data.metrics["train/loss"] for run in found] == [2.0, 3.0], (
        "the newest comes first, by which a comparison links it"
    )
    assert [run.info.status for run in found] == ["FINISHED", "FINISHED"]


def test_nobody_waits_for_a_server_that_does_not_answer(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the connection and says nothing: a request runs into its time limit."""
    said: list[str] = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(live, "END_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with live_run(stage(runs, "mute"), EXPERIMENT, said.append) as take:
            began = time.monotonic()
            for step in range(1, 1001):
                take(row(step))
            assert time.monotonic() - began < 0.5
            until(lambda: len(said) == 1)
            ended = time.monotonic()
        assert time.monotonic() - ended < 1.5
        until(lambda: not any(thread.name == "live metrics" for thread in threading.enumerate()))
    assert len(said) == 1 and "training goes on" in said[0]


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back_has_every_row_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client, one = mlflow.MlflowClient(store(runs)), stage(runs, "comes back")
    with live_run(one, EXPERIMENT, said.append) as take:
        take(row(1))
        until(lambda: len(said) == 1)  # it is away at first
        with served(runs, port):
            until(lambda: steps_of(client, one) == [1])
        for step in range(2, 300):
            take(row(step))
        time.sleep(1)
        assert steps_of(client, one) == [1]
        with served(runs, port):
            until(lambda: len(steps_of(client, one)) >= 299)
            take(row(300))
            until(lambda: len(steps_of(client, one)) >= 300)
            assert run_of(client, one).info.status == "RUNNING"
    assert steps_of(client, one) == list(range(1, 301))
    assert len(steps_of(client, one, "train/seconds_backward")) == 300
    assert len(said) == 1


@contextmanager
def served(runs: Path, port: int) -> Iterator[None]:
    """Run a tracking server for the length of a block; nothing of it is left."""
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        *address,
        "--backend-store-uri",
        store(runs),
    ]
    with (runs / "server.txt").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=runs)
    try:
        yield
    finally:
        family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        for process in family:
            process.kill()
        server.wait(20)
        psutil.wait_procs(family, timeout=20)


def test_a_store_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """A process that is killed while MLflow makes its tables leaves nothing that the next one would stumble over."""
    path = tmp_path / "runs" / "mlflow.db"
    code = f"from pipelines.tracking.runs import make_store; print('begun', flush=True); make_store('sqlite:///{path}')"
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert maker.stdout is not None and maker.stdout.readline() == b"begun\n"
    until(lambda: any(one.stat().st_size for one in path.parent.glob(".mlflow.db.*/mlflow.db")))
    maker.kill()
    maker.communicate()
    assert not path.exists()
    for _ in range(2):  # the second finds it there
        make_store(f"sqlite:///{path}")
    assert mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    assert [one.name for one in path.parent.iterdir() if not one.name.startswith(".")] == [
        "mlflow.db"
    ]
