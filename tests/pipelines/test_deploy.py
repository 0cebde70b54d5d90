"""A deployment on a real Prefect server with a real worker: a schedule fires, an event fires, and the flow runs."""

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
    """Return a folder with the smallest recipe there is: one rank, one step, no second base."""
    folder = tmp_path_factory.mktemp("deploy")
    recipe = tiny_recipe(
        save_tiny_model(folder / "model"),
        save_pairs(folder / "pairs.jsonl"),
        base_model={"quantization": "none"},
        lora={"ranks": [2]},
        training={"steps": 1, "warmup_steps": 0},
        evaluation={"general": ["piqa"], "items_per_benchmark": 2, "generations": 1},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
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
def server(place: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a Prefect server, and a worker on the pool that `lora deploy` makes."""
    (place / "prefect").mkdir()
    without_url = {name: value for name, value in environment.items() if name != "PREFECT_API_URL"}
    started = [_start(["server", "start", "--host", "127.0.0.1", "--port", str(PORT)], place / "server.txt", without_url)]
    try:
        _until(lambda: httpx.get(f"{API}/health").status_code == 200, seconds=120)
        started.append(_start(["worker", "start", "--pool", "lora", "--type", "process"], place / "worker.txt", environment))
        yield
    finally:
        for process in reversed(started):
            _end(process)


def test_a_schedule_and_an_event_each_start_a_run_that_completes(place: Path, server: None, environment: dict[str, str]) -> None:
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


def test_a_malformed_cron_is_refused(place: Path, server: None, environment: dict[str, str]) -> None:
    refused = _lora(place, environment, "deploy", "tiny.yaml", "--cron", "every night")
    assert refused.returncode == 2
    assert "'every night' is malformed" in refused.stderr


def _lora(place: Path, environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(BIN / "lora"), *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False)


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
