"""What a training leaves: the adapter in PEFT's format with its identity, or the control's weights. Rank 0 writes."""

import shutil
from pathlib import Path
from typing import Any

from lora_core import Identity, LoraConfig, save_adapter
from lora_core.adapter.adapter_files import CONFIG, read_json
from lora_core.errors import AdapterError
from lora_core.spectrum.spectrum import effective_rank, singular_values
from lora_core.spectrum.updates import read_updates
from pipelines.training.engine import Engine


def save_trained(
    engine: Engine, config: LoraConfig | None, inputs: dict[str, Any], place: Path
) -> dict[str, Any]:
    """Write the adapter, or the control's weights, into `place`; return their size and digest. Every rank calls it."""
    engine.accelerator.wait_for_everyone()
    folder, figures = place / output_of(config), dict[str, Any]()
    with engine.gathered():
        if engine.is_first:
            figures = (
                _save_model(engine, folder, inputs)
                if config is None
                else _save_adapter(engine, folder, config, inputs)
            )
            figures["file_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    engine.accelerator.wait_for_everyone()
    return figures


def output_of(config: LoraConfig | None) -> str:
    """Name the folder of what is trained."""
    return "adapter" if config is not None else "model"


def _save_adapter(
    engine: Engine, folder: Path, config: LoraConfig, inputs: dict[str, Any]
) -> dict[str, Any]:
    base = inputs["base"]
    identity = Identity(base["id"], base["revision"], base["digests"], _lineage(inputs))
    sha256 = save_adapter(engine.model, folder, config, identity)
    return {
        "adapter_sha256": sha256,
        "file_rank": read_json(folder / CONFIG)["r"],
        "spectrum": spectrum(folder),
    }


def _save_model(engine: Engine, folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    engine.model.save_pretrained(folder)
    if inputs.get("trust_remote_code"):  # what was written is loaded by the same code
        base = Path(engine.model.config._name_or_path)
        for source in base.rglob("*.py"):
            (folder / source.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / source.relative_to(base))
    return {}


def spectrum(adapter: Path) -> list[dict[str, Any]]:
    """Return the singular values of each module's ΔW and how many of them count; nothing where ΔW is not all that was trained."""
    try:
        values = {name: singular_values(update) for name, update in read_updates(adapter).items()}
    except (
        AdapterError
    ):  # DoRA, biases, modules trained whole: no product of two factors says what they changed
        return []
    return [
        {
            "module": name,
            "rank": len(one),
            "effective_rank": round(effective_rank(one), 3),
            "values": [float(f"{v:.4g}") for v in one.tolist()],
        }
        for name, one in values.items()
    ]


def _lineage(inputs: dict[str, Any]) -> dict[str, str]:
    base = inputs["base"]
    return {
        "data_digest": inputs["data_digest"],
        "tokenizer_sha256": base["tokenizer_sha256"],
        "template_sha256": base["template_sha256"],
        "quantization": inputs["quantization"],
        "init": inputs["lora"]["init"],
    }
