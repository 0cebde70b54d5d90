"""Verify the forward pass on examples of the run before training, and report how it is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import nn
from transformers import PreTrainedModel

from lora_core.usage import refuse_unused_layers
from pipelines.errors import BaseModelError, PipelineError
from pipelines.models.equivalence import combined, verified_reader
from pipelines.models.forward import PackReader
from pipelines.models.hardware import Hardware, reset_peak_memory
from pipelines.models.measurement import Probe
from pipelines.models.rounding import verified_with_products
from pipelines.models.verification_cache import VerificationCache, training_key
from pipelines.runtime.heartbeats import note
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.runtime.interfaces.results import TrainingFacts
from pipelines.runtime.interfaces.verified import Verified
from pipelines.training.run import Run

LISTED_TENSORS = 5
"""Maximum number of tensors without a gradient that are listed by name."""


def verify_reader(
    run: Run,
    model: PreTrainedModel,
    inputs: TrainInputs,
    hardware: Hardware,
    cache: VerificationCache,
) -> tuple[PackReader, Verified]:
    """Choose how packs are read, and verify it against the model's own forward.

    A collective: the ranks share the probes, unless an earlier training of the same base, data and
    method verified this. If they find different readers, every rank verifies on all probes.

    Args:
        run: has the examples, and the ranks that share them.
        model: as it will be trained.
        inputs: base, quantization and adapter, which the key of the cache has.
        hardware: of this process, which chooses the dtypes.
        cache: of earlier verifications of the same kind.

    Raises:
        PipelineError: the ranks would still read the base in different ways.
        TargetError: the model does not use an adapted layer.
    """
    trained = _trained_by_name(model)
    with run.timer.phase("check"):
        probes = run.probes()
        key = training_key(model, probes, trained, dtype=hardware.dtype, settings=_identity(inputs))
        # the first rank decides for all, so that no rank verifies alone
        (known,) = broadcast_object_list([cache.load(key, Verified)])
        verified = known or _verify_together(run, model, probes, trained, hardware)
    run.timer.discard()  # the check belongs to no step
    reset_peak_memory()
    _prepare_ddp(run, verified)
    if known is None and run.accelerator.is_main_process:
        cache.save(key, verified.model_copy(update={"verified_by": cache.stage, "seconds": 0.0}))
    if inputs.adapter is not None:
        refuse_unused_layers(model, verified.without_gradient)
    reader = replace(PackReader.of(model, verified), products=hardware.product_dtype)
    return reader, verified


def _prepare_ddp(run: Run, verified: Verified) -> None:
    """Tell DDP if some gradients may be missing; it waits for those of all tensors otherwise."""
    if verified.without_gradient:
        run.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)


def _trained_by_name(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def _verify_together(
    run: Run,
    model: PreTrainedModel,
    probes: Sequence[Probe],
    trained: Mapping[str, nn.Parameter],
    hardware: Hardware,
) -> Verified:
    """Verify on probes that are divided among the ranks; a collective.

    Raises:
        BaseModelError: a rank refuses the base; every rank raises its error.
        PipelineError: the ranks would read the base in different ways, each on all probes.
    """
    own_probe = probes[run.accelerator.process_index % len(probes)]
    is_divided = run.accelerator.num_processes >= len(probes)
    for some in ([own_probe], probes) if is_divided else (probes,):
        found = _gather_verified(model, some, trained, hardware)
        ways = {(one.path, one.own_head) for one in found}
        if len(ways) == 1:
            return combined(found[: len(probes)] if some is not probes else found[:1])
    raise PipelineError(
        f"the ranks would read the base in different ways ({ways}); run them on hosts of one kind"
    )


def _gather_verified(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    trained: Mapping[str, nn.Parameter],
    hardware: Hardware,
) -> list[Verified]:
    """Verify on a rank's probes; return the results of all ranks.

    Raises:
        BaseModelError: a rank refuses the base. All ranks raise it, so that none waits for another.
    """
    outcome: Verified | BaseModelError
    try:
        outcome = _verified(model, probes, trained, hardware)
    except BaseModelError as error:
        outcome = error
    found = []
    for one in gather_object([outcome]):
        if isinstance(one, BaseModelError):
            raise one
        found.append(one)
    return found


def _verified(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    trained: Mapping[str, nn.Parameter],
    hardware: Hardware,
) -> Verified:
    products = hardware.product_dtype
    if products is not None:
        return verified_with_products(model, probes, trained=trained, products=products)
    _, verified = verified_reader(model, probes, trained=trained, dtype=hardware.dtype)
    return verified


def _identity(inputs: TrainInputs) -> dict[str, Any]:
    """Return the inputs that, with the examples, decide how a training reads these."""
    values: dict[str, Any] = {
        "method": inputs.method,
        "base": inputs.base_digests,
        "quantization": inputs.quantization,
    }
    if inputs.adapter is not None:
        values["lora"] = inputs.adapter.lora.model_dump(mode="json")
    return values


def announce(folder: Path, facts: TrainingFacts, *, ranks: int, first: int) -> None:
    """Note how the training is computed, the verification, and the tensors it does not reach.

    Args:
        folder: of the stage; gets the notes.
        facts: how the training is computed.
        ranks: number of processes.
        first: steps taken before this process.
    """
    where = f"{ranks} ranks; from step {first}"
    note(folder, f"{facts.trained_weights} trained weights; {facts.choices}; {where}")
    note(folder, str(facts.forward))
    names = facts.forward.without_gradient
    if not names:
        return
    listed = ", ".join(names[:LISTED_TENSORS])
    if len(names) > LISTED_TENSORS:
        listed += f" and {len(names) - LISTED_TENSORS} more"
    note(
        folder,
        f"{len(names)} trained tensors received no gradient from the first examples: {listed}",
    )
