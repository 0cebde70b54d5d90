"""Comparisons as the registry gets them: with the folders that training leaves, in miniature."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from summaries import Summary, parsed

from lora_core.files import sha256_of_file
from pipelines.comparison.document import Registered
from pipelines.config.sections import LoraSettings, OptimizationSettings
from pipelines.reporting.origin import NO_FLOW_RUN, FlowRunReference
from pipelines.runtime.interfaces.inputs import AdapterInputs, TrainInputs
from pipelines.runtime.interfaces.kinds import TRAIN
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.runtime.stage import Stage

WEIGHTS = "adapter_model.safetensors"


def write_training(folder: Path, steps: int = 2) -> Path:
    """Write the metrics.jsonl of an older version, without the seconds of each phase."""
    rows = []
    for step in range(1, steps + 1):
        loss = 3.0 - 1e-4 * step
        row = {"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": None, "seconds": 2.0}
        rows.append(row | {"time": 1000.0 + 2 * step})
    return write_rows(folder, rows)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def write_adapter(folder: Path, content: str) -> str:
    """Write a file in place of an adapter's weights; return its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_text(content)
    return sha256_of_file(folder / WEIGHTS)


def training_stage(data_digest: str, runs: Path) -> Stage[TrainInputs, TrainResult]:
    """Return a training of rank 4 over a base in 4 bits."""
    adapter = AdapterInputs(
        rank=4,
        lora=LoraSettings(alpha=32),
        base_id="tiny",
        base_revision="",
        tokenizer_sha256="34" * 32,
        template_sha256="56" * 32,
    )
    inputs = TrainInputs(
        base_digests={"dense": "12" * 32},
        data_digest=data_digest,
        quantization="nf4",
        learning_rate=0.002,
        training=OptimizationSettings(steps=9),
        seed=7,
        adapter=adapter,
    )
    return Stage(TRAIN, "rank-4", inputs, runs)


def register(
    comparison: Summary,
    runs: Path,
    files: Sequence[Path] = (),
    note: str = "",
    flow_run: FlowRunReference = NO_FLOW_RUN,
) -> Registered:
    """Parse a comparison and register it."""
    from pipelines.tracking import registry  # imports MLflow, which may be missing

    return registry.register(parsed(comparison), runs, list(files), note, flow_run)


def copied(summary: Summary) -> Summary:
    values: Summary = json.loads(json.dumps(summary))
    return values


def retrained(summary: Summary, content: str, **changes: Any) -> Summary:
    """Return a later comparison, whose rank 16 was trained again."""
    summary = copied(summary) | changes
    model = summary["models"]["rank-16"]
    training = model["training"]
    folder = write_training(Path(f"{training['folder']}-{content}"))
    training["folder"] = str(folder)
    training["result"]["saved"]["adapter_sha256"] = write_adapter(folder / "adapter", content)
    return summary | {"key": content.ljust(64, "k")}


def runs_with_store(folders: pytest.TempPathFactory) -> Path:
    """Return a new folder of runs with an empty SQLite store.

    MLflow takes seconds to create one, so all stores of a session are copies of the first.
    """
    from pipelines.tracking.runs import ensure_store

    template = folders.getbasetemp() / "empty-store" / "mlflow.db"
    ensure_store(f"sqlite:///{template}")
    runs = folders.mktemp("runs")
    shutil.copyfile(template, runs / "mlflow.db")
    return runs


def configure_store(runs: Path) -> None:
    """Make the store in a folder of runs that of every client."""
    import mlflow

    from pipelines.tracking.runs import configure_mlflow_client

    configure_mlflow_client()
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)


@dataclass(frozen=True)
class SmallVersions:
    """Adds versions to a registered model without a comparison: one file, and the tags."""

    runs: Path
    folder: Path

    def add(self, name: str, content: str, **tags: str) -> str:
        """Register a version; return its number."""
        from mlflow import MlflowClient

        from pipelines.tracking.runs import experiment_id

        client = MlflowClient()
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        adapter = self.folder / name / content / "adapter"
        sha256 = write_adapter(adapter, content)
        run = client.create_run(experiment_id(client, name, self.runs)).info
        client.log_artifacts(run.run_id, str(adapter), "adapter")
        found = {"adapter_sha256": sha256, "verdict": "pass", "task_gain": "0.5", **tags}
        source = f"{run.artifact_uri}/adapter"
        created = client.create_model_version(name, source, run.run_id, tags=found)
        return str(created.version)
