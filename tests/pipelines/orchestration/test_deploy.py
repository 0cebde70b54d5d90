"""A deployment on a real Prefect server with a real worker: it is started, cancelled, bereft of its worker, and goes on."""

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


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectHost]:
    """Run a host with the smallest recipe there is, one rank, one step, no second base, and one that takes a while."""
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
    assert sorted(
        "cron" if "cron" in schedule["schedule"] else "interval" for schedule in schedules
    ) == ["cron", "interval"]

    wait_for_run("RUNNING", host, auto_scheduled=True)
    quiet = host.lora(
        "deploy", "tiny.yaml", "--on-event", "data.arrived"
    )  # no schedule from here on
    assert quiet.returncode == 0, quiet.stderr
    scheduled = wait_for_run("COMPLETED", host, auto_scheduled=True)
    assert scheduled["parameters"]["recipe"].endswith("tiny.yaml")
    assert (host.folder / "runs" / "pairs_tiny_cpu" / "summary.json").is_file()

    emit = "from prefect.events import emit_event; emit_event('data.arrived', resource={'prefect.resource.id': 'domain-data'})"
    subprocess.run([sys.executable, "-c", emit], env=host.environment, check=True, timeout=60)
    by_event = wait_for_run("COMPLETED", host, auto_scheduled=False)
    assert by_event["created_by"]["type"] == "AUTOMATION"


def test_a_run_that_is_cut_short_leaves_nothing_and_goes_on(host: PrefectHost) -> None:
    """Once it is cancelled, once its worker is killed; the third one goes on from the last checkpoint to the end."""
    assert host.lora("deploy", "long.yaml").returncode == 0
    deployment = host.deployment("long_tiny_cpu")["id"]

    run = host.run(deployment)
    until(lambda: steps_kept(host) > 0, seconds=120)
    assert host.slots() == [1] and len(at_work(host)) >= 4  # the flow, the launcher, two ranks
    host.cancel(run)
    until(
        lambda: host.state(run) == "CANCELLED" and not at_work(host) and host.slots() == [0],
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
        lambda: host.state(run) == "CRASHED" and not at_work(host) and host.slots() == [0],
        seconds=45,
    )

    kept = steps_kept(host)
    host.start_worker()
    run = host.run(deployment)
    until(lambda: steps_kept(host) > kept, seconds=120)
    with beside(
        host, "run", "tiny.yaml", "--rank", "4"
    ) as other:  # another recipe waits for its turn
        until(
            lambda: "another run is at work" in (host.folder / "other.txt").read_text(), seconds=60
        )
        assert host.state(run) == "RUNNING"
        until(lambda: host.state(run) == "COMPLETED", seconds=200)
        assert other.wait(120) == 0
    logs = [path.read_text() for path in (host.folder / "runs").glob("train/rank-2-*/log.txt")]
    assert kept > 0 and any(f"from step {kept}\n" in log for log in logs)
    assert host.slots() == [0]


def test_a_malformed_cron_is_refused(host: PrefectHost) -> None:
    refused = host.lora("deploy", "tiny.yaml", "--cron", "every night")
    assert refused.returncode == 2
    assert "'every night' is malformed" in refused.stderr


@contextmanager
def beside(host: PrefectHost, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Run the command line beside what else the host does; what it says goes to other.txt."""
    with (host.folder / "other.txt").open("wb") as stream:
        other = subprocess.Popen(
            [LORA, *arguments], cwd=host.folder, env=host.environment, stdout=stream, stderr=stream
        )
    try:
        yield other
    finally:
        other.terminate()
        other.wait(60)


def steps_kept(host: PrefectHost) -> int:
    """Return the step of the newest checkpoint of the long recipe."""
    kept = (host.folder / "runs").glob("train/rank-2-*/checkpoints/step-*[0-9]")
    return max((int(path.name.removeprefix("step-")) for path in kept), default=0)


def at_work(host: PrefectHost) -> list[str]:
    """Return the commands of all processes of a run: a flow, and what works in the folder of runs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            ours = process.environ().get("LORA_RUNS") == host.environment["LORA_RUNS"]
            if ours and {"prefect.engine", "pipelines.training.train"} & {*words}:
                found.append(" ".join(words))
    return found


def wait_for_run(state: str, host: PrefectHost, *, auto_scheduled: bool) -> dict[str, Any]:
    """Return the first flow run in a state that a schedule, or something else, has started."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        runs = host.post(
            "flow_runs/filter", flow_runs={"state": {"type": {"any_": [state]}}}
        )  # by state: runs to come would fill it
        found[:] = [run for run in runs if run["auto_scheduled"] == auto_scheduled]
        return bool(found)

    try:
        until(look, seconds=400)
    except TimeoutError:
        pytest.fail((host.folder / "worker.txt").read_text()[-3000:])
    return found[0]
