"""A deployment on a real Prefect server and worker starts, is cancelled, and resumes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_host import (
    LORA,
    PrefectHost,
    command_lines,
    prefect_host,
    processes_of,
    suspend_training,
    until,
)
from tiny import save_pairs, save_tiny_model, tiny_recipe
from webhook import Webhook, webhook

from pipelines.orchestration.deploy import deploy_recipe
from pipelines.orchestration.deploy_options import DeployOptions

pytestmark = [pytest.mark.server, pytest.mark.slow]
EMIT = """
import sys
from prefect.events import emit_event

for _ in range(2):
    emit_event(
        'data.arrived',
        resource={'prefect.resource.id': 'domain-data'},
        payload={'data': sys.argv[1]},
    )
"""
NOWHERE = "127.0.0.1:9"
SECRETS = {
    "HF_TOKEN": "planted-token",
    "MLFLOW_TRACKING_USERNAME": "anna",
    "MLFLOW_TRACKING_PASSWORD": "planted-password",
    "AWS_SECRET_ACCESS_KEY": "planted-key",
}


@pytest.fixture(scope="module")
def chat() -> Iterator[Webhook]:
    """Serve the webhook of a team's chat."""
    with webhook() as chat:
        yield chat


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, chat: Webhook) -> Iterator[PrefectHost]:
    """Run a host with secrets, the smallest recipe (one rank, step and base), and a longer one."""
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
    training = {"steps": 1000, "checkpoint_every": 10, "checkpoint_time_fraction": 1}
    long: dict[str, Any] = {
        "name": "long_tiny_cpu",
        "control": {"method": "none"},
        # A fast host must not complete it before the last of the four runs.
        "training": {**training, "batch_size": 32},
        "launch": {"config": "cpu_ddp", "processes": 2},
    }
    (folder / "long.yaml").write_text(yaml.safe_dump(tiny_recipe(model, pairs, **small, **long)))
    with prefect_host(folder, **SECRETS, LORA_NOTIFY_URL=chat.url) as host:
        yield host


def test_a_schedule_and_an_event_each_start_a_run_that_completes(
    host: PrefectHost, chat: Webhook
) -> None:
    registry = host.folder / "team.db"
    triggers = ["--cron", "0 2 * * *", "--interval", "15", "--on-event", "data.arrived"]
    team = {"MLFLOW_TRACKING_URI": f"sqlite:///{registry.name}"}
    deployed = host.lora("deploy", "tiny.yaml", *triggers, "--debounce", "3", **team)
    assert deployed.returncode == 0, deployed.stderr
    assert "prefect worker start --pool lora" in deployed.stdout
    assert f"MLFLOW_TRACKING_URI=sqlite:///{registry}" in deployed.stdout
    deployment = host.deployment("pairs_tiny_cpu")
    assert sorted(one["slug"] for one in deployment["schedules"]) == ["cron", "interval"]

    wait_for_run("RUNNING", host, auto_scheduled=True)
    quiet = host.lora("deploy", "tiny.yaml", "--no-schedules")
    assert quiet.returncode == 0, quiet.stderr
    assert "schedule cron: removed" in quiet.stdout
    assert "event data.arrived: kept" in quiet.stdout
    scheduled = wait_for_run("COMPLETED", host, auto_scheduled=True)
    assert scheduled["parameters"]["recipe"].endswith("tiny.yaml")
    assert scheduled["name"] == "pairs_tiny_cpu rank 2"
    assert (host.folder / "runs" / "pairs_tiny_cpu" / "summary.json").is_file()
    assert registry.is_file()
    assert not (host.folder / "runs" / "mlflow.db").exists()
    assert chat.texts[0].startswith("pairs_tiny_cpu: no adapter passes")

    pairs = str(host.folder / "pairs.jsonl")
    subprocess.run([sys.executable, "-c", EMIT, pairs], env=host.environment, check=True)
    by_event = wait_for_run("COMPLETED", host, auto_scheduled=False)
    assert by_event["created_by"]["type"] == "AUTOMATION"
    assert by_event["parameters"]["data"] == pairs
    assert by_event["name"] == f"pairs_tiny_cpu rank 2 on {pairs}"
    assert artifacts_of(host, by_event["id"]) == {"pairs-tiny-cpu"}
    emitted = host.post("events/filter", filter={"event": {"prefix": ["lora."]}})["events"]
    resources = {(one["event"], one["resource"]["prefect.resource.id"]) for one in emitted}
    assert resources == {("lora.nothing.passed", "lora.recipe.pairs_tiny_cpu")}

    # Both events together started one run.
    runs = host.post("flow_runs/filter", flow_runs={"deployment_id": {"any_": [deployment["id"]]}})
    assert sum(not one["auto_scheduled"] for one in runs) == 1


def test_a_check_without_new_data_runs_nothing(host: PrefectHost) -> None:
    deployment = host.deployment("pairs_tiny_cpu")["id"]
    run = host.run(deployment, only_if_changed=True)
    until(lambda: host.state(run) == "COMPLETED", seconds=60)
    state = host.get(f"flow_runs/{run}")["state"]
    assert "recipe and data are unchanged since the run 'pairs_tiny_cpu rank 2" in state["message"]
    assert host.post("task_runs/filter", flow_runs={"id": {"any_": [run]}}) == []


def test_no_output_has_a_secret(host: PrefectHost, chat: Webhook) -> None:
    """A run that fails at a server with an account in its address shows neither, and no token."""
    address = {
        "MLFLOW_TRACKING_URI": f"http://anna:planted-password@{NOWHERE}",
        "LORA_REGISTRY_SECONDS": "1",
    }
    with ThreadPoolExecutor() as pool:
        running = pool.submit(host.lora, "run", "tiny.yaml", **address)
        while not running.done():
            assert not [words for words in command_lines() if "planted" in words]
            time.sleep(1)
    failed = running.result()
    assert failed.returncode != 0
    assert NOWHERE in failed.stderr
    deployed = host.lora("deploy", "tiny.yaml", **address)
    assert deployed.returncode == 0, deployed.stderr
    assert f"MLFLOW_TRACKING_URI=http://{NOWHERE}" in deployed.stdout
    assert "needs them in its own environment" in deployed.stdout
    assert "failed" in chat.texts[-1]
    outputs = [failed.stdout, failed.stderr, deployed.stdout, deployed.stderr, *chat.texts]
    assert not [text for text in outputs if "planted" in text]
    files = [path for path in host.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"planted" in path.read_bytes()]
    assert any(NOWHERE.encode() in path.read_bytes() for path in files)


@pytest.mark.timeout(1500)
def test_an_interrupted_run_leaves_no_process_and_resumes(host: PrefectHost) -> None:
    """Two runs are cancelled, one of them without its worker; a third is suspended and resumes."""
    assert host.lora("deploy", "long.yaml").returncode == 0
    deployment = host.deployment("long_tiny_cpu")["id"]

    run = host.run(deployment)
    until(lambda: steps_kept(host) > 0, seconds=120)
    assert host.slots() == [1]
    assert len(processes_of(host)) >= 5  # the flow, its fork server, the launcher, two ranks
    host.cancel(run)
    until(
        lambda: host.state(run) == "CANCELLED" and not processes_of(host) and host.slots() == [0],
        seconds=45,
    )
    assert any("step 1/1000" in line for line in host.log(run))
    assert "long-tiny-cpu" in artifacts_of(host, run)

    outlive_a_restart_and_cancel(host, deployment)

    kept = steps_kept(host)
    run = host.run(deployment)
    until(lambda: steps_kept(host) > kept, seconds=120)
    host.suspend(run)
    until(lambda: not processes_of(host) and host.slots() == [0], seconds=45)
    assert host.state(run) == "PAUSED"

    kept = steps_kept(host)
    host.resume(run)
    until(lambda: steps_kept(host) > kept, seconds=120)
    assert host.state(run) == "RUNNING"
    # A run of another recipe waits for the slot, however long the training takes.
    stopped = suspend_training(host)
    with concurrent_run(host, "tiny.yaml", "--rank", "4") as other:
        until(lambda: "another run uses" in (host.folder / "other.txt").read_text(), seconds=150)
        assert host.state(run) == "RUNNING"
        for process in stopped:
            process.resume()
        until(lambda: host.state(run) == "COMPLETED", seconds=400)
        assert other.wait(120) == 0
    logs = [path.read_text() for path in (host.folder / "runs").glob("train/rank-2-*/log.txt")]
    assert kept > 0
    assert any(f"from step {kept}\n" in log for log in logs)
    assert host.slots() == [0]


def outlive_a_restart_and_cancel(host: PrefectHost, deployment: str) -> None:
    """Restart worker and server during a training, which continues; then cancel it."""
    kept = steps_kept(host)
    run = host.run(deployment)
    until(lambda: steps_kept(host) > kept, seconds=120)
    kept, started = steps_kept(host), processes_of(host)
    host.kill_worker()
    host.restart_server()
    host.start_worker()
    until(lambda: steps_kept(host) > kept, seconds=60)
    assert host.state(run) == "RUNNING"
    assert sorted(processes_of(host)) == sorted(started)
    host.cancel(run)
    until(
        lambda: host.state(run) == "CANCELLED" and not processes_of(host) and host.slots() == [0],
        seconds=90,
    )


def test_deploying_again_keeps_what_it_does_not_name(
    host: PrefectHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((host.folder / "tiny.yaml").read_text())
    path = host.folder / "kept.yaml"
    path.write_text(yaml.safe_dump({**recipe, "name": "kept"}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")

    def deploy(**options: Any) -> str:
        requested = DeployOptions(pool="idle", **options).requested()
        with temporary_settings({PREFECT_API_URL: host.environment["PREFECT_API_URL"]}):
            return deploy_recipe(str(path), requested)

    weekly: dict[str, Any] = {"cron": "0 3 * * 0", "timezone": "Europe/Berlin"}
    created = deploy(**weekly, rank=[2, 4], on_event=["data.arrived"])
    assert "schedule cron: added, '0 3 * * 0' in Europe/Berlin, ranks [2, 4]" in created
    [cron] = host.deployment("kept")["schedules"]
    assert cron["parameters"] == {"ranks": [2, 4]}
    own = f"deployments/{cron['deployment_id']}"
    host.change(own, paused=True)
    host.change(f"{own}/schedules/{cron['id']}", active=False, parameters=cron["parameters"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    address = "https://hooks.example/planted"
    again = deploy(
        interval=3600, rank=[2], schedule="nightly", on_event=["base.updated"], notify=address
    )
    assert "messages are sent to the webhook" in again and address not in again
    assert "schedule nightly: added, every 3600 s, ranks [2]" in again
    assert "schedule cron: kept, '0 3 * * 0' in Europe/Berlin, ranks [2, 4], paused" in again
    assert "event base.updated: added" in again
    assert "event data.arrived: kept" in again
    assert "stays paused" in again
    assert "MLFLOW_TRACKING_URI=http://mlflow.example:5000 (kept" in again
    deployment = host.deployment("kept")
    assert deployment["paused"]
    assert {one["slug"]: one["active"] for one in deployment["schedules"]} == {
        "cron": False,
        "nightly": True,
    }

    changed = deploy(cron="0 4 * * 0", on_event=["data.arrived"], debounce=5, no_events=True)
    assert "schedule cron: changed, '0 4 * * 0' in UTC, paused (before" in changed
    assert "event data.arrived: changed, a run 5 s later" in changed
    assert "event base.updated: removed" in changed
    removed = deploy(no_schedules=True, no_events=True)
    assert host.deployment("kept")["schedules"] == []
    assert removed.count("removed") == 3
    assert "nothing starts it" in deploy()


def artifacts_of(host: PrefectHost, run: str) -> set[str]:
    """Return the keys of a run's artifacts, without its progress bars."""
    found = host.post("artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
    assert all(one["description"] for one in found)
    return {one["key"] for one in found if one["type"] != "progress"}


@contextmanager
def concurrent_run(host: PrefectHost, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Start `lora run` at the same time; its output goes to other.txt."""
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
