"""A deployment on a real Prefect server and worker starts, is cancelled, and resumes."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest
import yaml
from prefect_host import LORA, PrefectHost, prefect_host, until
from tiny import save_pairs, save_tiny_model, tiny_recipe

pytestmark = [pytest.mark.server, pytest.mark.slow]
EMIT = """
from prefect.events import emit_event

emit_event('data.arrived', resource={'prefect.resource.id': 'domain-data'})
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectHost]:
    """Run a host with the smallest recipe (one rank, one step, one base) and a longer one."""
    folder = tmp_path_factory.mktemp("deploy")
    model = save_tiny_model(folder / "model")
    pairs = save_pairs(folder / "pairs.jsonl")
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
        "training": {"steps": 600, "checkpoint_every": 10, "checkpoint_time_fraction": 1},
        "launch": {"config": "cpu_ddp", "processes": 2},
    }
    (folder / "long.yaml").write_text(yaml.safe_dump(tiny_recipe(model, pairs, **small, **long)))
    with prefect_host(folder) as host:
        yield host


def test_a_schedule_and_an_event_each_start_a_run_that_completes(host: PrefectHost) -> None:
    deployed = host.lora(
        "deploy",
        "tiny.yaml",
        "--cron",
        "* * * * *",
        "--interval",
        "3600",
        "--on-event",
        "data.arrived",
    )
    assert deployed.returncode == 0, deployed.stderr
    assert "prefect worker start --pool lora" in deployed.stdout
    schedules = host.deployment("pairs_tiny_cpu")["schedules"]
    kinds = ["cron" if "cron" in one["schedule"] else "interval" for one in schedules]
    assert sorted(kinds) == ["cron", "interval"]

    wait_for_run("RUNNING", host, auto_scheduled=True)
    # No schedule from here on.
    quiet = host.lora("deploy", "tiny.yaml", "--on-event", "data.arrived")
    assert quiet.returncode == 0, quiet.stderr
    scheduled = wait_for_run("COMPLETED", host, auto_scheduled=True)
    assert scheduled["parameters"]["recipe"].endswith("tiny.yaml")
    assert (host.folder / "runs" / "pairs_tiny_cpu" / "summary.json").is_file()

    subprocess.run([sys.executable, "-c", EMIT], env=host.environment, check=True, timeout=60)
    by_event = wait_for_run("COMPLETED", host, auto_scheduled=False)
    assert by_event["created_by"]["type"] == "AUTOMATION"


def test_an_interrupted_run_leaves_no_process_and_resumes(host: PrefectHost) -> None:
    """The first run is cancelled, the second loses its worker, the third resumes and completes."""
    assert host.lora("deploy", "long.yaml").returncode == 0
    deployment = host.deployment("long_tiny_cpu")["id"]

    run = host.run(deployment)
    until(lambda: steps_kept(host) > 0, seconds=120)
    assert host.slots() == [1]
    assert len(processes_of(host)) >= 4  # the flow, the launcher, two ranks
    host.cancel(run)
    until(
        lambda: host.state(run) == "CANCELLED" and not processes_of(host) and host.slots() == [0],
        seconds=45,
    )
    assert any("step 1/600" in line for line in host.log(run))
    bars = host.post(
        "artifacts/filter",
        artifacts={"type": {"any_": ["progress"]}, "flow_run_id": {"any_": [run]}},
    )
    assert "step" in bars[0]["description"]

    kept = steps_kept(host)
    run = host.run(deployment)
    until(lambda: steps_kept(host) > kept, seconds=120)
    host.kill_worker()
    until(
        lambda: host.state(run) == "CRASHED" and not processes_of(host) and host.slots() == [0],
        seconds=45,
    )

    kept = steps_kept(host)
    host.start_worker()
    run = host.run(deployment)
    until(lambda: steps_kept(host) > kept, seconds=120)
    # A run of another recipe waits for the slot.
    with concurrent_run(host, "tiny.yaml", "--rank", "4") as other:
        until(lambda: "another run uses" in (host.folder / "other.txt").read_text(), seconds=60)
        assert host.state(run) == "RUNNING"
        until(lambda: host.state(run) == "COMPLETED", seconds=200)
        assert other.wait(120) == 0
    logs = [path.read_text() for path in (host.folder / "runs").glob("train/rank-2-*/log.txt")]
    assert kept > 0
    assert any(f"from step {kept}\n" in log for log in logs)
    assert host.slots() == [0]


def test_a_malformed_cron_is_refused(host: PrefectHost) -> None:
    refused = host.lora("deploy", "tiny.yaml", "--cron", "every night")
    assert refused.returncode == 2
    assert "'every night' is malformed" in refused.stderr


@contextmanager
def concurrent_run(host: PrefectHost, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Start `lora run` at the same time as the deployment; its output goes to other.txt."""
    command = [LORA, "run", *arguments]
    with (host.folder / "other.txt").open("wb") as stream:
        other = subprocess.Popen(
            command, cwd=host.folder, env=host.environment, stdout=stream, stderr=stream
        )
    try:
        yield other
    finally:
        other.terminate()
        other.wait(60)


def steps_kept(host: PrefectHost) -> int:
    """Return the step of the latest checkpoint of the long recipe."""
    kept = (host.folder / "runs").glob("train/rank-2-*/checkpoints/step-*[0-9]")
    return max((int(path.name.removeprefix("step-")) for path in kept), default=0)


def processes_of(host: PrefectHost) -> list[str]:
    """Return the commands of all processes of a run: flows, and trainings in the folder of runs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            ours = process.environ().get("LORA_RUNS") == host.environment["LORA_RUNS"]
            if ours and {"prefect.engine", "pipelines.training.train"} & {*words}:
                found.append(" ".join(words))
    return found


def wait_for_run(state: str, host: PrefectHost, *, auto_scheduled: bool) -> dict[str, Any]:
    """Return the first flow run in a state that was started by a schedule, or not by one."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        # Filter by state: scheduled runs would fill the page of results.
        runs = host.post("flow_runs/filter", flow_runs={"state": {"type": {"any_": [state]}}})
        found[:] = [run for run in runs if run["auto_scheduled"] == auto_scheduled]
        return bool(found)

    try:
        until(look, seconds=400)
    except TimeoutError:
        pytest.fail((host.folder / "worker.txt").read_text()[-3000:])
    return found[0]
