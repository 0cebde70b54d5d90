"""The end of a run: what was registered is told wherever people look, and a registry that fails loses nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from summaries import Summary, build

from pipelines.config.recipe import Recipe
from pipelines.errors import RegistryError
from pipelines.tracking import registry
from pipelines.workflow import publishing, tasks
from pipelines.workflow.run import Run
from pipelines.workflow.stages import Stages

REGISTERED = {
    "model": "tiny-model",
    "parent_run": "p",
    "versions": {"rank-16": 3},
    "aliases": {"champion": 3},
}
TOLD = "Registered in tiny-model: rank-16 as version 3; champion is version 3."


class Registry:
    """Stands for MLflow: keeps what the files held when they were logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, str]] = []

    def register(
        self, summary: Summary, runs: Path, files: list[Path], note: str
    ) -> dict[str, Any]:
        self._log(files, note)
        return REGISTERED

    def describe(
        self, registered: dict[str, Any], runs: Path, files: list[Path], note: str
    ) -> None:
        assert registered == REGISTERED
        self._log(files, note)

    def _log(self, files: list[Path], note: str) -> None:
        self.logged.append(
            {**{file.name: file.read_text(encoding="utf-8") for file in files}, "note": note}
        )


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Take the place of the registry."""
    stand_in = Registry()
    monkeypatch.setattr(registry, "register", stand_in.register)
    monkeypatch.setattr(registry, "describe", stand_in.describe)
    return stand_in


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what Prefect's page and the terminal show."""
    texts: list[str] = []

    def show(table: Table) -> None:
        console = Console(width=200, color_system=None)
        with console.capture() as captured:
            console.print(table)
        texts.append(captured.get())

    monkeypatch.setattr(tasks, "show_comparison", lambda note, decision: texts.append(note))
    monkeypatch.setattr(publishing, "show", show)
    return texts


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


@pytest.fixture
def run(summary: Summary, tmp_path: Path) -> Run:
    recipe = Recipe.model_validate(summary["recipe"])
    return Run(recipe, Stages(recipe, tmp_path))


def failing(*arguments: Any) -> None:
    raise RegistryError("MLflow does not answer")


def test_what_was_registered_is_told_everywhere(
    run: Run, summary: Summary, mlflow: Registry, shown: list[str]
) -> None:
    path = publishing.publish(run, summary)
    before, after = mlflow.logged
    assert TOLD not in before["note"] + before["report.html"] and TOLD in after["note"]
    assert f'<p class="quiet" id="registered">{TOLD}</p>' in after["report.html"]
    assert json.loads(after["summary.json"])["registered"] == REGISTERED
    assert after["summary.json"] == path.read_text(encoding="utf-8")
    assert after["report.html"] == (run.folder / "report.html").read_text(encoding="utf-8")
    assert len(shown) == 2 and all(TOLD in text for text in shown)
    assert [stage["name"] for stage in summary["stages"]] == ["register"]


@pytest.mark.parametrize("name", ["register", "describe"])
def test_a_registry_that_fails_loses_nothing(
    name: str,
    run: Run,
    summary: Summary,
    mlflow: Registry,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, name, failing)
    with pytest.raises(RegistryError, match="does not answer"):
        publishing.publish(run, summary)
    assert len(shown) == 2 and all((TOLD in text) == (name == "describe") for text in shown)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "rank-16" in page and (TOLD in page) == (name == "describe")


def test_what_is_no_refusal_is_not_kept_back(
    run: Run, summary: Summary, mlflow: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Callable[..., None] = lambda *arguments: {}["a mistake of ours"]  # noqa: E731
    monkeypatch.setattr(registry, "register", broken)
    with pytest.raises(KeyError):
        publishing.publish(run, summary)
