"""The loss of a trained control on the examples that are kept for choosing its learning rate.

python -m pipelines.evaluation.tuning STAGE_FOLDER
"""

from pathlib import Path

from datasets import load_from_disk

from lora_core import load_adapter
from pipelines.errors import DataError
from pipelines.evaluation.scoring import score_examples
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model
from pipelines.models.renames import weight_renames
from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import StagePaths, TuneInputs
from pipelines.runtime.interfaces.kinds import TUNE
from pipelines.runtime.interfaces.results import TuneResult


def tuning_loss(
    folder: Path, inputs: TuneInputs, paths: StagePaths
) -> tuple[TuneResult, list[str]]:
    """Return the loss in nats per supervised token.

    Args:
        folder: of the stage; nothing is written into it.
        inputs: how the model is stored.
        paths: of the trained weights, and of the prepared data with the tuning split.

    Returns:
        the result, and no files.

    Raises:
        DataError: there are no tuning examples.
    """
    split = paths.required("data") / "tuning"
    if not split.is_dir():
        raise DataError(
            "the held-out groups leave no examples to choose a learning rate on; "
            "hold out fewer examples, or name one rate"
        )
    is_trusted = inputs.trust_remote_code
    model = load_model(paths.weights, inputs.quantization, detect(), trust_remote_code=is_trusted)
    if paths.adapter is not None:
        load_adapter(model, Path(paths.adapter), renames=weight_renames(model))
    examples = list(load_from_disk(str(split)))
    scored = list(score_examples(CheckedReader(model), examples))
    nll = sum(record.nll for record in scored)
    tokens = sum(record.tokens for record in scored)
    return TuneResult(tuning_loss=nll / tokens, examples=len(scored)), []


if __name__ == "__main__":
    execute_stage(TUNE, tuning_loss)
