"""Comparisons as the registry gets them: with the folders that training leaves, in miniature."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from summaries import Summary, parsed

from lora_core.files import sha256_of_file
from pipelines.comparison.document import Registered
from pipelines.config.sections import LoraSettings, OptimizationSettings
from pipelines.runtime.interfaces.inputs import AdapterInputs, TrainInputs
from pipelines.runtime.interfaces.kinds import TRAIN
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.runtime.stage import Stage

WEIGHTS = "adapter_model.safetensors"


def write_training(folder: Path, steps: int = 2) -> Path:
    """Write the metrics.jsonl of an older version, without the seconds of each phase."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": None, "seconds": 2.0}
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
    comparison: Summary, runs: Path, files: Sequence[Path] = (), note: str = ""
) -> Registered:
    """Parse a comparison and register it."""
    from pipelines.tracking import registry  # imports MLflow, which may be missing

    return registry.register(parsed(comparison), runs, list(files), note)


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
