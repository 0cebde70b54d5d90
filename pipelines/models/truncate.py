"""Truncate a trained adapter to a lower rank: the closest update of that rank, layer by layer.

python -m pipelines.models.truncate STAGE_FOLDER
"""

from pathlib import Path

from lora_core.spectrum.truncation import truncate_adapter
from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import CutInputs, StagePaths
from pipelines.runtime.interfaces.kinds import CUT
from pipelines.runtime.interfaces.results import CutResult


def truncate(folder: Path, inputs: CutInputs, paths: StagePaths) -> tuple[CutResult, list[str]]:
    """Write adapter/ and return the fraction of the update that is lost, by module.

    Args:
        folder: of the stage; gets the truncated adapter.
        inputs: the lower rank.
        paths: of the trained adapter.

    Returns:
        the result, and the written files relative to `folder`.
    """
    truncated = folder / "adapter"
    lost = truncate_adapter(paths.required("adapter"), truncated, inputs.rank)
    files = [f"adapter/{path.name}" for path in sorted(truncated.iterdir())]
    return CutResult(rank=inputs.rank, lost=lost), files


if __name__ == "__main__":
    execute_stage(CUT, truncate)
