"""A deployment on a real Prefect server with a real worker: it is started, cancelled, bereft of its worker, and goes on."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from tiny import save_pairs, save_tiny_model, tiny_recipe

pytestmark = [pytest.mark.server, pytest.mark.slow]


def _free_port() -> int:
    """Return a port that nobody listens on; another run of these tests may be going on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


PORT = _free_port()
API = f"http://127.0.0.1:{PORT}/api"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the smallest recipe there is, one rank, one step, no second base, and one that takes a while."""
    folder = tmp_path_factory.mktemp("deploy")
    model, pairs = save_tiny_model(folder / "model"), save_pairs(folder / "pairs.jsonl")
    small: dict[str, Any] = {
        "base_model": {"quantization": "none"},
        "lora": {"ranks": [2]},
        "evaluation": {"general": ["piqa"], "items_per_benchmark": 2, "generations": 1},
    }
    recipe = tiny_recipe(model, pairs, **small, training={"steps": 1, "warmup_steps": 0})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    long: dict[str, Any] = {
        "name": "long_tiny_cpu",
        "control": {"method": "none"},
        "training": {"steps": 600, "checkpoint_every": 10, "checkpoint_share": 1},
        "launch": {"config": "cpu_ddp", "processes": 2},
    }
    (folder / "long.yaml").write_text(yaml.safe_dump(tiny_recipe(model, pairs, **small, **long)))
    return folder


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    """Return the environment of a team's host: a server by address, state in a folder of its own."""
    return {
        **os.environ,
        "PREFECT_API_URL": API,
        "PREFECT_HOME": str(place / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "LORA_RUNS": str(place / "runs"),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def server(place: Path, environment: dict[str, str]) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Run a Prefect server, and a worker on the pool that `lora deploy` makes; what a test starts in its place is ended too."""
    (place / "prefect").mkdir()
    without_url = {name: value for name, value in environment.items() if name != "PREFECT_API_URL"}
    started = [_start(["server", "start", "--host", "127.0.0.1", "--port", str(PORT)], place / "server.txt", without_url)]
    try:
        _until(lambda: httpx.get(f"{API}/health").status_code == 200, seconds=120)
        started.append(_worker(place, environment))
        yield started
    finally:
        for process in reversed(started):
            _end(process)


def test_a_schedule_and_an_event_each_start_a_run_that_completes(place: Path, server: object, environment: dict[str, str]) -> None:
    deployed = _lora(place, environment, "deploy", "tiny.yaml", "--cron", "* * * * *", "--interval", "3600", "--on-event", "data.arrived")
    assert deployed.returncode == 0, deployed.stderr
    assert "prefect worker start --pool lora" in deployed.stdout
    deployment = httpx.get(f"{API}/deployments/name/finetune/pairs_tiny_cpu").json()
    assert sorted("cron" if "cron" in schedule["schedule"] else "interval" for schedule in deployment["schedules"]) == ["cron", "interval"]

    _wait_for_run("RUNNING", place, auto_scheduled=True)
    quiet = _lora(place, environment, "deploy", "tiny.yaml", "--on-event", "data.arrived")  # no schedule from here on
    assert quiet.returncode == 0, quiet.stderr
    scheduled = _wait_for_run("COMPLETED", place, auto_scheduled=True)
    assert scheduled["parameters"]["recipe"].endswith("tiny.yaml")
    assert (place / "runs" / "pairs_tiny_cpu" / "summary.json").is_file()

    emit = "from prefect.events import emit_event; emit_event('data.arrived', resource={'prefect.resource.id': 'domain-data'})"
    subprocess.run([sys.executable, "-c", emit], env=environment, check=True, timeout=60)
    by_event = _wait_for_run("COMPLETED", place, auto_scheduled=False)
    assert by_event["created_by"]["type"] == "AUTOMATION"


def test_a_run_that_is_cut_short_leaves_nothing_and_goes_on(
    place: Path, server: "list[subprocess.Popen[bytes]]", environment: dict[str, str]
) -> None:
    """Once it is cancelled, once its worker is killed; the third one goes on from the last checkpoint to the end."""
    assert _lora(place, environment, "deploy", "long.yaml").returncode == 0
    deployment = httpx.get(f"{API}/deployments/name/finetune/long_tiny_cpu").json()["id"]

    run = _run(deployment)
    _until(lambda: _steps_kept(place) > 0, seconds=120)
    assert _slots() == [1] and len(_at_work(place)) >= 4  # the flow, the launcher, two ranks
    cancelling = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    assert httpx.post(f"{API}/flow_runs/{run}/set_state", json=cancelling).json()["status"] == "ACCEPT"
    _until(lambda: _state(run) == "CANCELLED" and not _at_work(place) and _slots() == [0], seconds=45)
    assert any("step 1/600" in line for line in _log(run))
    assert "step" in httpx.post(f"{API}/artifacts/filter", json=_of(run)).json()[0]["description"]

    kept = _steps_kept(place)
    run = _run(deployment)
    _until(lambda: _steps_kept(place) > kept, seconds=120)
    worker = server.pop()
    worker.kill()
    worker.wait(10)
    _until(lambda: _state(run) == "CRASHED" and not _at_work(place) and _slots() == [0], seconds=45)

    kept = _steps_kept(place)
    server.append(_worker(place, environment))
    run = _run(deployment)
    _until(lambda: _state(run) == "COMPLETED", seconds=200)
    logs = [path.read_text() for path in (place / "runs").glob("train/rank-2-*/log.txt")]
    assert kept > 0 and any(f"from step {kept}\n" in log for log in logs)
    assert _slots() == [0]


def test_a_malformed_cron_is_refused(place: Path, server: object, environment: dict[str, str]) -> None:
    refused = _lora(place, environment, "deploy", "tiny.yaml", "--cron", "every night")
    assert refused.returncode == 2
    assert "'every night' is malformed" in refused.stderr


def _lora(place: Path, environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(BIN / "lora"), *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False)


def _worker(place: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    return _start(["worker", "start", "--pool", "lora", "--type", "process"], place / "worker.txt", environment)


def _run(deployment: str) -> str:
    """Start a run of a deployment; return its id."""
    return str(httpx.post(f"{API}/deployments/{deployment}/create_flow_run", json={}).json()["id"])


def _state(run: str) -> str:
    return str(httpx.get(f"{API}/flow_runs/{run}").json()["state"]["type"])


def _log(run: str) -> list[str]:
    return [line["message"] for line in httpx.post(f"{API}/logs/filter", json={"logs": {"flow_run_id": {"any_": [run]}}}).json()]


def _of(run: str) -> dict[str, Any]:
    return {"artifacts": {"type": {"any_": ["progress"]}, "flow_run_id": {"any_": [run]}}}


def _slots() -> list[int]:
    """Return the slots that are taken on this host, of one for its cores or for each GPU."""
    limits = httpx.post(f"{API}/v2/concurrency_limits/filter", json={}).json()
    return sorted({limit["active_slots"] for limit in limits if limit["name"].startswith(("cpu:", "gpu:"))})


def _steps_kept(place: Path) -> int:
    """Return the step of the newest checkpoint of the long recipe."""
    kept = (place / "runs").glob("train/rank-2-*/checkpoints/step-*[0-9]")
    return max((int(path.name.removeprefix("step-")) for path in kept), default=0)


def _at_work(place: Path) -> list[str]:
    """Return the commands of all processes of a run: a flow, and what works in the folder of runs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if process.environ().get("LORA_RUNS") == str(place / "runs") and {"prefect.engine", "pipelines.training.train"} & {*words}:
                found.append(" ".join(words))
    return found


def _start(arguments: list[str], log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    with log.open("wb") as stream:
        return subprocess.Popen([sys.executable, "-m", "prefect", *arguments], env=environment, stdout=stream, stderr=stream)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a server with all it started: a worker would wait for the runs it is at."""
    everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    process.terminate()
    psutil.wait_procs(everything, timeout=5)
    for one in everything:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(10)


def _wait_for_run(state: str, place: Path, *, auto_scheduled: bool) -> dict[str, Any]:
    """Return the first flow run in a state that a schedule, or something else, has started."""
    in_state = {"flow_runs": {"state": {"type": {"any_": [state]}}}}  # asked for by state: runs to come would fill the page
    found: list[dict[str, Any]] = []

    def look() -> bool:
        runs = httpx.post(f"{API}/flow_runs/filter", json=in_state).json()
        found[:] = [run for run in runs if run["auto_scheduled"] == auto_scheduled]
        return bool(found)

    try:
        _until(look, seconds=400)
    except TimeoutError:
        pytest.fail((place / "worker.txt").read_text()[-3000:])
    return found[0]


def _until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise TimeoutError
