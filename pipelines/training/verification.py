"""Verify the forward pass on examples of the run before training, and report how it is computed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    gather_object,
)
from transformers import PreTrainedModel

from pipelines.errors import PipelineError
from pipelines.models.equivalence import verified_reader
from pipelines.models.forward import PackReader
from pipelines.models.hardware import reset_peak_memory
from pipelines.models.verification_cache import VerificationCache, training_key
from pipelines.models.verified import Verified, sentence
from pipelines.runtime.heartbeats import note
from pipelines.training.run import Run

LISTED_TENSORS = 5
"""Maximum number of tensors without a gradient that are listed by name."""


IDENTITY = ("method", "base", "quantization", "lora", "trust_remote_code")
"""Inputs of a training that, with its examples, decide how it reads them."""


def verify_reader(
    run: Run,
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    dtype: torch.dtype,
    cache: VerificationCache,
) -> tuple[PackReader, Verified]:
    """Choose how packs are read, and verify it against the model's own forward.

    A collective: every rank verifies, on the same probes, unless an earlier training of the same
    base, data and method did.

    Raises:
        PipelineError: the ranks would read the base in different ways.
    """
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    with run.timer.phase("check"):
        probes = run.probes()
        identity = {name: inputs[name] for name in IDENTITY if name in inputs}
        key = training_key(model, probes, trained, dtype=dtype, settings=identity)
        # the first rank decides for all, so that no rank verifies alone
        (known,) = broadcast_object_list([cache.load(key, Verified)])
        if known is None:
            reader, verified = verified_reader(model, probes, trained=trained, dtype=dtype)
        else:
            reader, verified = PackReader.of(model, known), known
    run.timer.collect()  # the check belongs to no step
    reset_peak_memory()
    paths = gather_object([(verified.path, verified.own_head)])
    if len(set(paths)) > 1:
        raise PipelineError(
            f"the ranks would read the base in different ways ({paths}); "
            "run them on hosts of one kind"
        )
    if any(gather_object([bool(verified.without_gradient)])):
        # DDP waits for the gradients of all tensors, unless it is told that some may be missing.
        run.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    if known is None and run.accelerator.is_main_process:
        cache.save(key, verified.model_copy(update={"verified_by": cache.stage, "seconds": 0.0}))
    return reader, verified


def announce(folder: Path, facts: dict[str, Any], *, ranks: int, first: int) -> None:
    """Note how the training is computed, the verification, and the tensors it does not reach."""
    where = f"{ranks} ranks; from step {first}"
    note(folder, f"{facts['trained_weights']} trained weights; {facts['choices']}; {where}")
    note(folder, sentence(facts["forward"]))
    names = facts["forward"]["without_gradient"]
    if not names:
        return
    listed = ", ".join(names[:LISTED_TENSORS])
    if len(names) > LISTED_TENSORS:
        listed += f" and {len(names) - LISTED_TENSORS} more"
    note(
        folder,
        f"{len(names)} trained tensors received no gradient from the first examples: {listed}",
    )
