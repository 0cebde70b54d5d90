"""An MLflow store next to the runs, and a comparison with the folders that training leaves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from registered import write_adapter, write_training
from summaries import Summary, build


@pytest.fixture
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Make each test's store a file next to its runs.

    MLflow writes the URI it is given into the environment. Without a URI it creates a file in the
    working directory, which must not be the repository.
    """
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)
    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs per module; creating its store is slow."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def comparison(tmp_path: Path, request: pytest.FixtureRequest) -> Summary:
    """A comparison with the test's own name, with the folders that training leaves."""
    summary = build(tmp_path)
    name = request.node.name.partition("[")[0]
    summary |= {"name": name, "key": name.ljust(64, "k")}
    summary["recipe"]["registry"]["model"] = name
    for label, model in summary["models"].items():
        folder = tmp_path / "train" / label
        if "training" in model:
            model["training"]["folder"] = str(write_training(folder))
        if "judgment" in model:
            saved = model["training"]["result"]["saved"]
            saved["adapter_sha256"] = write_adapter(folder / "adapter", label)
    return summary
