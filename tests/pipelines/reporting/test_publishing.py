"""Publishing reports the registered versions everywhere and survives a registry that fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_KEY, PREFECT_API_URL, temporary_settings
from rich.console import Console
from rich.table import Table
from summaries import Summary as Values
from summaries import parsed

from pipelines.comparison.document import Registered, Summary
from pipelines.errors import RegistryError
from pipelines.reporting.origin import FlowRunReference
from pipelines.tracking import registry
from pipelines.workflow import publishing, tasks
from pipelines.workflow.run import PipelineRun
from pipelines.workflow.stages import Stages

REGISTERED = Registered(
    tracking_uri="sqlite:///mlflow.db",
    experiment_id="1",
    parent_run="p",
    runs={"rank-16": "a"},
    model="tiny-model",
    versions={"rank-16": 3},
    aliases={"champion": 3},
)
FLOW_RUN = "0198-flow"
MESSAGE = "Registered in tiny-model: rank-16 as version 3; champion is version 3."


@pytest.fixture(autouse=True)
def no_events() -> Iterator[None]:
    """Let Prefect send no event: with a key and no address, it starts no server of its own."""
    with temporary_settings({PREFECT_API_URL: None, PREFECT_API_KEY: "unused"}):
        yield


class FakeRegistry:
    """Replaces MLflow: keeps the content that the files had when they were logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, str]] = []

    def register(
        self,
        summary: Summary,
        runs: Path,
        files: list[Path],
        note: str,
        flow_run: FlowRunReference,
    ) -> Registered:
        assert flow_run.id == FLOW_RUN
        self._log(files, note)
        return REGISTERED

    def describe(
        self,
        registered: Registered,
        runs: Path,
        files: list[Path],
        note: str,
        flow_run: FlowRunReference,
    ) -> None:
        assert (registered, flow_run.id) == (REGISTERED, FLOW_RUN)
        self._log(files, note)

    def _log(self, files: list[Path], note: str) -> None:
        content = {file.name: file.read_text(encoding="utf-8") for file in files}
        self.logged.append(content | {"note": note})


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeRegistry:
    """Replace the registry."""
    fake = FakeRegistry()
    monkeypatch.setattr(registry, "register", fake.register)
    monkeypatch.setattr(registry, "describe", fake.describe)
    return fake


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the texts on Prefect's page and in the terminal."""
    texts: list[str] = []

    def show(table: Table) -> None:
        console = Console(width=200, color_system=None)
        with console.capture() as captured:
            console.print(table)
        texts.append(captured.get())

    monkeypatch.setattr(tasks, "show_comparison", lambda note, decision, recipe: texts.append(note))
    monkeypatch.setattr(publishing, "print_table", show)
    return texts


@pytest.fixture
def typed(summary: Values) -> Summary:
    return parsed(summary)


@pytest.fixture
def run(typed: Summary, tmp_path: Path) -> PipelineRun:
    return PipelineRun(typed.recipe, Stages(typed.recipe, tmp_path), flow_run=FLOW_RUN)


def failing(*arguments: Any) -> None:
    raise RegistryError("MLflow does not answer")


def test_registered_versions_are_reported_everywhere(
    run: PipelineRun, typed: Summary, mlflow: FakeRegistry, shown: list[str]
) -> None:
    path = publishing.publish(run, typed)
    before, after = mlflow.logged
    assert MESSAGE not in before["note"] + before["report.html"]
    assert MESSAGE in after["note"]
    assert f'<p class="quiet" id="registered">{MESSAGE}</p>' in after["report.html"]
    written = json.loads(after["summary.json"])
    assert written["registered"] == REGISTERED.plain()
    assert after["summary.json"] == path.read_text(encoding="utf-8")
    assert after["report.html"] == (run.folder / "report.html").read_text(encoding="utf-8")
    assert len(shown) == 2
    assert all(MESSAGE in text for text in shown)
    assert [stage["name"] for stage in written["stages"]] == ["register"]


@pytest.mark.parametrize("name", ["register", "describe"])
def test_failing_registry_loses_nothing(
    name: str,
    run: PipelineRun,
    typed: Summary,
    mlflow: FakeRegistry,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, name, failing)
    with pytest.raises(RegistryError, match="does not answer"):
        publishing.publish(run, typed)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    is_registered = name == "describe"
    assert len(shown) == 2
    assert all((MESSAGE in text) == is_registered for text in shown)
    assert "rank-16" in page
    assert (MESSAGE in page) == is_registered


def test_programming_error_is_raised_at_once(
    run: PipelineRun, typed: Summary, mlflow: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("an internal bug")

    monkeypatch.setattr(registry, "register", broken)
    with pytest.raises(KeyError):
        publishing.publish(run, typed)
