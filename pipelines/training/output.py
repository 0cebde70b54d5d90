"""Output of a training: the adapter in PEFT format with its identity, or the control's weights.

Rank 0 writes.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lora_core import Identity, LoraConfig, save_adapter
from lora_core.adapter.json_files import CONFIG, IDENTITY, read_json
from lora_core.files import atomic_folder
from pipelines.errors import DivergenceError
from pipelines.models.hardware import peak_memory_bytes
from pipelines.models.tokenizer import CHANGED_TOKENIZER
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.runtime.interfaces.kinds import TRAIN
from pipelines.runtime.interfaces.results import SavedWeights, TrainResult
from pipelines.runtime.stage import RESULT, SNAPSHOTS, read_inputs, snapshot, write_result
from pipelines.training.engine import Engine
from pipelines.training.spectra import spectrum


def peak_memory_of_all_ranks(engine: Engine) -> int:
    """Return the largest peak of memory of any rank, in bytes. A collective."""
    return max(engine.gather(peak_memory_bytes()))


def copy_tokenizer(engine: Engine, config: LoraConfig | None, data: Path, folder: Path) -> None:
    """Copy the tokenizer to the trained weights if the recipe changed it. Every rank calls it.

    Args:
        engine: for its rank.
        config: the adapter's; None for full fine-tuning.
        data: folder of the prepared data.
        folder: of the stage.
    """
    changed = data / CHANGED_TOKENIZER
    if engine.is_first and changed.is_dir():
        shutil.copytree(changed, folder / output_folder(config), dirs_exist_ok=True)
    engine.wait_for_everyone()


def declare_done(
    folder: Path, engine: Engine, config: LoraConfig | None, result: TrainResult
) -> None:
    """Write the stage's result, with every snapshot that was ever kept. Every rank calls it.

    Args:
        folder: of the stage.
        engine: for its rank.
        config: the adapter's; None for full fine-tuning.
        result: complete on rank 0.
    """
    if engine.is_first:
        files = [*(folder / output_folder(config)).iterdir(), *(folder / SNAPSHOTS).glob("*/*/*")]
        write_result(folder, result, [str(path.relative_to(folder)) for path in sorted(files)])
    engine.wait_for_everyone()


def missing_snapshots(folder: Path, steps: Sequence[int]) -> list[int]:
    """Return the steps for which a finished run has no snapshot.

    Args:
        folder: of a stage with a result.
        steps: numbers of steps after which the options name a snapshot.
    """
    files = read_json(folder / RESULT)["files"]
    return [step for step in steps if not _has_snapshot(files, step)]


def _has_snapshot(files: list[str], step: int) -> bool:
    return any(name.startswith(f"{snapshot(step)}/") for name in files)


def write_trained(
    engine: Engine, config: LoraConfig | None, inputs: TrainInputs, parent: Path
) -> None:
    """Write the adapter, or the control's weights, into `parent`: complete, or not at all.

    A collective: every rank calls it, and the weights are gathered from all. Only the first rank
    writes.

    Args:
        engine: whose weights are gathered.
        config: the adapter's; None for full fine-tuning.
        inputs: for the identity that is saved with an adapter.
        parent: folder that gets adapter/ or model/.
    """
    engine.wait_for_everyone()
    folder = parent / output_folder(config)
    with engine.gathered():
        if engine.is_first:
            if config is None:
                _save_model(engine, folder, inputs)
            else:
                _save_adapter(engine, folder, config, inputs)
    engine.wait_for_everyone()


def saved_weights(
    parent: Path, config: LoraConfig | None, *, with_spectrum: bool = True
) -> SavedWeights:
    """Return size, digest and spectrum of what was written into `parent`. On rank 0.

    Args:
        parent: folder of the stage, with adapter/ or model/.
        config: the adapter's; None for full fine-tuning.
        with_spectrum: compute the singular values of the update, which takes time.
    """
    folder = parent / output_folder(config)
    file_bytes = sum(path.stat().st_size for path in folder.iterdir())
    if config is None:
        return SavedWeights(file_bytes=file_bytes)
    _, paths = read_inputs(parent, TRAIN)
    return SavedWeights(
        file_bytes=file_bytes,
        adapter_sha256=read_json(folder / IDENTITY)["adapter_sha256"],
        file_rank=read_json(folder / CONFIG)["r"],
        spectrum=spectrum(folder, paths.required("base")) if with_spectrum else (),
    )


def output_folder(config: LoraConfig | None) -> str:
    """Return the name of the folder of the trained weights."""
    return "adapter" if config is not None else "model"


def _save_adapter(engine: Engine, folder: Path, config: LoraConfig, inputs: TrainInputs) -> None:
    adapter = inputs.adapter
    assert adapter is not None, "an adapter is saved for a training that has one"
    lineage = {
        "data_digest": inputs.data_digest,
        "tokenizer_sha256": adapter.tokenizer_sha256,
        "template_sha256": adapter.template_sha256,
        "quantization": inputs.quantization,
        "init": adapter.lora.init,
    }
    if adapter.end_tokens:
        lineage["end_tokens"] = " ".join(map(str, adapter.end_tokens))
    identity = Identity(adapter.base_id, adapter.base_revision, inputs.base_digests, lineage)
    for name, weight in engine.model.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            raise DivergenceError(f"the weights of {name} are not finite; lower the learning rate")
    save_adapter(engine.model, folder, config, identity)


def _save_model(engine: Engine, folder: Path, inputs: TrainInputs) -> None:
    with atomic_folder(folder) as temporary:
        engine.model.save_pretrained(temporary)
        if inputs.trust_remote_code:
            _copy_code(Path(engine.model.config._name_or_path), temporary)


def _copy_code(base: Path, folder: Path) -> None:
    """Copy the base's Python files, which also load the saved model."""
    for source in base.rglob("*.py"):
        target = folder / source.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
