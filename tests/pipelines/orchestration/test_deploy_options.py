"""The options of `lora deploy` name schedules and events; a worker gets addresses, no secrets."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.errors import PipelineError
from pipelines.orchestration.deploy_options import (
    DATA_CHECK_SECONDS,
    DeployOptions,
    RequestedEvent,
    RequestedSchedule,
)
from pipelines.orchestration.schedules import schedule_of
from pipelines.orchestration.worker_environment import can_be_shown, worker_environment
from pipelines.paths import tracking_account

WITHOUT_DATA = {"data": "{{ event.payload.data }}"}


def test_a_schedule_has_its_own_ranks_name_and_time_zone() -> None:
    options = DeployOptions(
        cron="0 2 * * *", timezone="Europe/Berlin", schedule="nightly", rank=[8]
    )
    assert options.requested().schedules == (
        RequestedSchedule("nightly", "0 2 * * *", "Europe/Berlin", parameters={"ranks": [8]}),
    )


def test_schedules_are_named_by_their_kind() -> None:
    schedules = DeployOptions(cron="0 2 * * *", interval=60).requested().schedules
    assert [one.slug for one in schedules] == ["cron", "interval"]


def test_an_event_can_bring_data_and_is_debounced() -> None:
    options = DeployOptions(on_event=["data.arrived", "base.updated"], rank=[4], debounce=5)
    parameters = {**WITHOUT_DATA, "ranks": [4]}
    assert options.requested().events == (
        RequestedEvent("data.arrived", 5, parameters),
        RequestedEvent("base.updated", 5, parameters),
    )


def test_an_event_is_debounced_for_a_minute_by_default() -> None:
    [event] = DeployOptions(on_event=["data.arrived"]).requested().events
    assert event == RequestedEvent("data.arrived", 60, WITHOUT_DATA)


def test_data_are_checked_every_hour_or_when_a_schedule_is_due() -> None:
    changed = {"only_if_changed": True}
    [alone] = DeployOptions(on_data=True).requested().schedules
    assert alone == RequestedSchedule(
        "data", interval_seconds=DATA_CHECK_SECONDS, parameters=changed
    )
    [nightly] = DeployOptions(on_data=True, cron="0 2 * * *").requested().schedules
    assert (nightly.slug, nightly.parameters) == ("cron", changed)
    requested = DeployOptions(on_data=True, on_event=["data.arrived"]).requested()
    assert requested.schedules == ()
    assert requested.events[0].parameters == {**WITHOUT_DATA, **changed}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DeployOptions(timezone="Europe/Berlin"), "without --cron"),
        (DeployOptions(cron="0 2 * * *", timezone="Berlin"), "time zone 'Berlin' is unknown"),
        (DeployOptions(schedule="nightly"), "names no time"),
        (DeployOptions(cron="0 2 * * *", schedule="every night"), "'every night' is not a name"),
        (DeployOptions(cron="0 2 * * *", interval=60, schedule="a"), "two schedules"),
        (DeployOptions(on_data=True, on_event=["a"], schedule="b"), "names no time"),
        (DeployOptions(rank=[8]), "--rank 8 belongs to a schedule or an event"),
        (DeployOptions(on_data=True, debounce=60), "--debounce 60 has no effect without"),
        (DeployOptions(pool="team/gpu"), "'team/gpu' contains one of"),
    ],
    ids=[
        "timezone alone",
        "unknown zone",
        "name alone",
        "malformed name",
        "one name for two",
        "name of an event",
        "rank",
        "debounce",
        "pool",
    ],
)
def test_options_without_effect_are_refused(options: DeployOptions, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        options.requested()


def test_an_interval_of_zero_is_refused() -> None:
    ended = CliRunner().invoke(app, ["deploy", "recipe.yaml", "--interval", "0"])
    assert ended.exit_code == 2
    assert "greater than or equal to 1" in " ".join(ended.output.split())


def test_only_the_values_of_addresses_and_folders_are_printed() -> None:
    assert can_be_shown("MLFLOW_TRACKING_URI")
    assert can_be_shown("LORA_RUNS")
    assert not can_be_shown("HF_TOKEN")
    assert not can_be_shown("TEAM_API_KEY")


def test_a_worker_gets_addresses_and_the_names_of_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secrets = {"HF_TOKEN": "planted", "MLFLOW_TRACKING_PASSWORD": "planted"}
    environment = worker_environment(
        {
            "MLFLOW_TRACKING_URI": "http://mlflow.example:5000",
            "LORA_REGISTRY_SECONDS": "600",
            "HF_HOME": "cache",
            "AWS_ENDPOINT_URL": "https://s3.example",
            "HF_ENDPOINT": "https://user:planted@hub.example",
            "HOME": "/home/somebody",
            **secrets,
        }
    )
    assert environment.variables.pop("LORA_RUNS")
    assert environment.variables == {
        "MLFLOW_TRACKING_URI": "http://mlflow.example:5000",
        "LORA_REGISTRY_SECONDS": "600",
        "HF_HOME": str(tmp_path / "cache"),
        "AWS_ENDPOINT_URL": "https://s3.example",
    }
    assert set(environment.secrets) == {*secrets, "HF_ENDPOINT"}


def test_a_database_with_a_password_is_not_stored(tmp_path: Path) -> None:
    uri = "postgresql://mlflow:planted@db.example/mlflow"
    environment = worker_environment({"MLFLOW_TRACKING_URI": uri})
    assert set(environment.variables) == {"LORA_RUNS"}
    assert environment.secrets == ("MLFLOW_TRACKING_URI",)


def test_a_relative_database_file_is_the_same_for_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = worker_environment({"MLFLOW_TRACKING_URI": "sqlite:///team.db"})
    assert found.variables["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/team.db"


def test_the_account_of_a_tracking_server_is_apart_from_its_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://anna:pl%40nted@mlflow.example:5000/team")
    assert tracking_account() == {
        "MLFLOW_TRACKING_URI": "https://mlflow.example:5000/team",
        "MLFLOW_TRACKING_USERNAME": "anna",
        "MLFLOW_TRACKING_PASSWORD": "pl@nted",
    }
    for other in ("http://mlflow.example:5000", "postgresql://mlflow:planted@db.example/mlflow"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
        assert tracking_account() == {}


def test_a_malformed_cron_is_refused() -> None:
    with pytest.raises(PipelineError, match="'every night' is malformed"):
        schedule_of(RequestedSchedule("nightly", cron="every night"))
