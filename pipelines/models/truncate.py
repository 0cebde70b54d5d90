"""Truncate a trained adapter to a lower rank: the closest update of that rank, layer by layer.

python -m pipelines.models.truncate STAGE_FOLDER
"""

from pathlib import Path
from typing import Any

from lora_core.spectrum.truncation import truncate_adapter
from pipelines.runtime.child import execute_stage


def truncate(
    folder: Path, inputs: dict[str, Any], paths: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Write adapter/ and return the fraction of the update that is lost, by module."""
    truncated = folder / "adapter"
    lost = truncate_adapter(Path(paths["adapter"]), truncated, inputs["rank"])
    files = [f"adapter/{path.name}" for path in sorted(truncated.iterdir())]
    return {"rank": inputs["rank"], "lost": lost}, files


if __name__ == "__main__":
    execute_stage(truncate)
