"""The loss of trained models on the tuning examples, by which one of several is chosen.

    python -m pipelines.evaluation.tuning STAGE_FOLDER [STAGE_FOLDER ...]

Consecutive stages with equal base and quantization share the loaded model. The loss of an adapter
that gives no finite loss is infinite.
"""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import PreTrainedModel

from pipelines.comparison.record_types import TaskRecord
from pipelines.errors import DataError
from pipelines.evaluation.models import Models
from pipelines.evaluation.scoring import score_examples
from pipelines.models.checked import CheckedReader
from pipelines.models.forward import PackReader
from pipelines.models.hardware import detect
from pipelines.models.packs import pack
from pipelines.runtime.child import execute_stages
from pipelines.runtime.interfaces.inputs import StagePaths, TuneInputs
from pipelines.runtime.interfaces.kinds import TUNE
from pipelines.runtime.interfaces.results import TuneResult


class Tuning:
    """Computes the losses of one model after the other, which may share a base."""

    def __init__(self) -> None:
        self.models = Models(detect())

    def __call__(
        self, folder: Path, inputs: TuneInputs, paths: StagePaths
    ) -> tuple[TuneResult, list[str]]:
        """Return the losses of one model.

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
        examples = list(load_from_disk(str(split)))
        is_trusted = inputs.trust_remote_code
        with self.models.use(paths, inputs.quantization, trust_remote_code=is_trusted) as model:
            if paths.adapter is not None and not _is_finite(model, examples[0]):
                return _diverged(len(examples)), []
            records = list(score_examples(CheckedReader(model), examples))
        return _result(records), []


@torch.no_grad()
def _is_finite(model: PreTrainedModel, example: dict[str, Any]) -> bool:
    """Return whether a model's loss is finite; after training at too high a rate it may not be."""
    reader = PackReader.default(model)
    return bool(reader.loss(pack([example], str(model.device))).isfinite())


def _diverged(examples: int) -> TuneResult:
    return TuneResult(tuning_loss=inf, losses=(inf,) * examples, tokens=(1,) * examples)


def _result(records: Sequence[TaskRecord]) -> TuneResult:
    losses = tuple(record.nll for record in records)
    tokens = tuple(record.tokens for record in records)
    return TuneResult(tuning_loss=sum(losses) / sum(tokens), losses=losses, tokens=tokens)


if __name__ == "__main__":
    execute_stages(TUNE, Tuning())
