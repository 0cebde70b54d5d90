"""Comparisons as the registry gets them: with the folders that training leaves, in miniature."""

import json
from pathlib import Path
from typing import Any

from summaries import Summary

from lora_core.files import sha256_of_file

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


def retrained(summary: Summary, content: str, **changes: Any) -> Summary:
    """Return a later comparison, whose rank 16 was trained again."""
    summary = json.loads(json.dumps(summary)) | changes
    model = summary["models"]["rank-16"]
    training = model["training"]
    folder = write_training(Path(f"{training['folder']}-{content}"))
    training["folder"] = str(folder)
    training["result"]["saved"]["adapter_sha256"] = write_adapter(folder / "adapter", content)
    return summary | {"key": content.ljust(64, "k")}
