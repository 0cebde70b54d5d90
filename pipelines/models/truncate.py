"""Cut a trained adapter to a lower rank: the closest update of that rank, layer by layer.

python -m pipelines.models.truncate STAGE_FOLDER
"""

from pathlib import Path
from typing import Any

from lora_core.spectrum.truncation import truncate_adapter
from pipelines.runtime.child import run_stage


def cut(
    folder: Path, inputs: dict[str, Any], paths: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Write adapter/ and return the share of the update that is lost, by module."""
    lost = truncate_adapter(Path(paths["adapter"]), folder / "adapter", inputs["rank"])
    return {"rank": inputs["rank"], "lost": lost}, [
        f"adapter/{path.name}" for path in sorted((folder / "adapter").iterdir())
    ]


if __name__ == "__main__":
    run_stage(cut)
