"""Set up what a run trains: the base, the adapter or all weights, the reader and the engine."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_core import LoraConfig, trained_weights
from lora_core.config import DATA_DRIVEN_INITS
from lora_core.layers.linear import keep_product_dtype
from lora_core.modules import modules_outside_language_model
from lora_core.training.optim import loraplus_groups
from pipelines.models.forward import PackReader
from pipelines.models.hardware import Hardware, Optimizer, attention_kernel
from pipelines.models.loading import attention_heads, load_model
from pipelines.models.support import enable_checkpointing
from pipelines.models.verification_cache import VerificationCache
from pipelines.planning.plan import lora_config
from pipelines.runtime.interfaces.inputs import TrainInputs, TrainOptions
from pipelines.runtime.interfaces.results import TrainingFacts
from pipelines.training.checkpoint import WEIGHTS, LoadedCheckpoint
from pipelines.training.checkpoint_state import load_trained_weights
from pipelines.training.engine import Engine, disable_zero_init, is_deepspeed, prepare
from pipelines.training.initialization import inject_initialized
from pipelines.training.optimizers import select_optimizer
from pipelines.training.run import Run
from pipelines.training.verification import verify_reader


def load_base(base: Path, inputs: TrainInputs, hardware: Hardware) -> PreTrainedModel:
    """Load the complete base on every rank.

    For full fine-tuning it is float32, unless DeepSpeed keeps float32 master weights.

    Args:
        base: folder of the base.
        inputs: how it is stored, and what is trained.
        hardware: device and dtype of this process.
    """
    masters = inputs.method == "full" and not is_deepspeed()
    with disable_zero_init():
        return load_model(
            base,
            inputs.quantization,
            hardware,
            masters=masters,
            trust_remote_code=inputs.trust_remote_code,
        )


def adapt(
    model: PreTrainedModel,
    inputs: TrainInputs,
    *,
    examples: Iterable[dict[str, Any]],
    base: Path,
    checkpoint: LoadedCheckpoint | None = None,
) -> LoraConfig | None:
    """Inject the adapter and return its config, or, for full fine-tuning, train every weight.

    A run that resumes takes its weights from the checkpoint, so it skips a data-driven
    initialization that they would overwrite.

    Args:
        model: as it was loaded; changed in place.
        inputs: the adapter, or full fine-tuning.
        examples: of all steps, for a data-driven initialization.
        base: folder of the base, for an initialization from the weight.
        checkpoint: from which the run resumes, if it does.
    """
    config = None
    if inputs.adapter is not None:
        config = lora_config(inputs.adapter.lora, inputs.adapter.rank)
        initial = config
        if checkpoint is not None and config.init_lora_weights in DATA_DRIVEN_INITS:
            initial = replace(config, init_lora_weights="kaiming")
        inject_initialized(model, initial, seed=inputs.seed, examples=examples, base=base)
    else:
        freeze_towers(model)
    if checkpoint is not None:
        load_trained_weights(model, checkpoint.tensors[WEIGHTS])
    model.train()
    return config


def freeze_towers(model: PreTrainedModel) -> None:
    """Freeze a multimodal model's modules outside the language model: no text reaches them."""
    for tower in modules_outside_language_model(model).values():
        tower.requires_grad_(False)


def build_engine(
    run: Run,
    model: PreTrainedModel,
    inputs: TrainInputs,
    options: TrainOptions,
    hardware: Hardware,
    cache: VerificationCache,
) -> tuple[Engine, TrainingFacts]:
    """Choose reader and optimizer; return engine and choices. A collective of all ranks.

    Args:
        run: the data of this rank, and the settings of a step.
        model: with what is trained; see `adapt`.
        inputs: method, learning rate and weight decay.
        options: how the training uses this host.
        hardware: of this process.
        cache: of earlier verifications.

    Raises:
        BaseModelError: no way of reading the base agrees with its own forward.
        PipelineError: the engine cannot train this model.
    """
    weights = trained_weights(model)
    prepare_forward(model, hardware, checkpointing=options.gradient_checkpointing)
    reader, verified = verify_reader(run, model, inputs, hardware, cache)
    optimizer = _choose_optimizer(run, model, inputs, options, hardware)
    engine = _engine(run, reader, inputs, optimizer)
    engine.limit_waiting(options.timeout_seconds)
    attention = _attention(reader, model, hardware)
    return engine, TrainingFacts(
        trained_weights=weights,
        processor=hardware.name,
        optimizer=optimizer.name,
        dtype=hardware.dtype_name,
        attention=attention,
        choices=hardware.describe(attention, optimizer),
        forward=verified,
    )


def prepare_forward(model: PreTrainedModel, hardware: Hardware, *, checkpointing: bool) -> None:
    """Set how the forward pass of a training saves activations.

    Args:
        model: with what is trained; changed in place.
        hardware: of this process.
        checkpointing: save the inputs of blocks only.
    """
    if checkpointing:
        enable_checkpointing(model)
    if hardware.product_dtype is not None:
        keep_product_dtype(model)


def _choose_optimizer(
    run: Run,
    model: PreTrainedModel,
    inputs: TrainInputs,
    options: TrainOptions,
    hardware: Hardware,
) -> Optimizer:
    """Choose one optimizer for all ranks. A collective."""
    return select_optimizer(
        run.accelerator,
        hardware,
        model,
        options,
        full=inputs.method == "full",
        tokens=run.largest_pack_tokens,
    )


def _engine(run: Run, reader: PackReader, inputs: TrainInputs, optimizer: Optimizer) -> Engine:
    return prepare(
        run.accelerator,
        reader,
        parameter_groups(reader.model, inputs),
        optimizer=optimizer,
        max_grad_norm=run.max_grad_norm,
        timer=run.timer,
    )


def _attention(reader: PackReader, model: PreTrainedModel, hardware: Hardware) -> str:
    """Return the name of the attention that reads packs."""
    if reader.packed:
        return attention_kernel(hardware, attention_heads(model))
    return reader.attention


def parameter_groups(model: PreTrainedModel, inputs: TrainInputs) -> list[dict[str, Any]]:
    """Return what the optimizer trains, with learning rates: one for all, or LoRA+'s for B.

    Args:
        model: its parameters that require a gradient are trained.
        inputs: learning rate, weight decay and LoRA+ ratio.
    """
    learning_rate = inputs.learning_rate
    weight_decay = inputs.training.weight_decay
    ratio = 1.0 if inputs.adapter is None else inputs.adapter.lora.loraplus_ratio
    if ratio != 1:
        return loraplus_groups(
            model.named_parameters(),
            learning_rate=learning_rate,
            ratio=ratio,
            weight_decay=weight_decay,
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}]
