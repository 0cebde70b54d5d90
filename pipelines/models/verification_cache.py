"""What the stages in one folder of runs have verified, so that equal verifications run once.

    <runs>/verified/<key>.json

The key is a digest of everything that decides how a model is read: its class and config, dtype,
device, library versions and this software, and for a training also its base, method, trained
tensors and examples.
The rank of an adapter, the learning rate and the seed do not decide it: three ranks of one adapter
are read in the same way. A file that is missing or cannot be read costs time and nothing else.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import nn
from transformers import PreTrainedModel

import lora_core
import pipelines.models
from lora_core.files import write_text
from pipelines.models.measurement import Probe
from pipelines.runtime.stage import digest, library_versions

FOLDER = "verified"
NOT_ARCHITECTURE = ("_name_or_path", "transformers_version")
"""What a config states that does not change what the model computes."""
Stored = TypeVar("Stored", bound=BaseModel)


class VerificationCache:
    """Reads and writes the verifications of one folder of runs."""

    def __init__(self, stage: Path) -> None:
        """Share with the other stages of a folder of runs.

        Args:
            stage: the folder of a stage, <runs>/<kind>/<name>.
        """
        self.stage = stage.name
        self.folder = stage.absolute().parents[1] / FOLDER

    def load(self, key: str, kind: type[Stored]) -> Stored | None:
        """Return what is stored under a key; None if there is nothing or it is not valid.

        Args:
            key: see `architecture_key` and `training_key`.
            kind: type of what was stored.
        """
        with suppress(OSError, ValidationError, UnicodeDecodeError):
            return kind.model_validate_json(self._file(key).read_text())
        return None

    def save(self, key: str, value: BaseModel) -> None:
        """Store a verification under a key.

        Args:
            key: see `architecture_key` and `training_key`.
            value: replaces what is stored under the key.
        """
        write_text(self._file(key), value.model_dump_json(indent=2) + "\n")

    def _file(self, key: str) -> Path:
        return self.folder / f"{key[:16]}.json"


def architecture_key(model: PreTrainedModel) -> str:
    """Return a digest of all that decides how a model is read, but for its weights."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in NOT_ARCHITECTURE:
        config.pop(name, None)
    kind = type(model)
    module = sys.modules[kind.__module__]
    return digest(
        {
            "code": _code_digest(),
            "class": f"{kind.__module__}.{kind.__qualname__}",
            # of code that comes with a base; the module's name may stay the same when it changes
            "custom_code": getattr(module, "__transformers_module_hash__", ""),
            "config": config,
            "dtype": str(model.dtype),
            "device": _device_name(model.device),
            "versions": library_versions(),
        }
    )


def training_key(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    trained: Mapping[str, nn.Parameter],
    *,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> str:
    """Return a digest of all that decides how a training reads its examples.

    Args:
        model: as it will be trained.
        probes: the examples on which it would be verified.
        trained: the trained parameters, by name.
        dtype: of the computation.
        settings: what further identifies the base and the method, plain values.
    """
    packs = []
    for probe in probes:
        pack = probe.pack
        packs.append([pack.input_ids.tolist(), pack.predicts.tolist(), probe.gradient])
    return digest(
        {
            "architecture": architecture_key(model),
            "trained": [[name, str(tensor.dtype)] for name, tensor in trained.items()],
            "checkpointing": _checkpoints_activations(model),
            "dtype": str(dtype),
            "probes": packs,
            "settings": dict(settings),
        }
    )


@cache
def _code_digest() -> str:
    """Return a digest of the code that reads models and verifies it."""
    sources = hashlib.sha256()
    for package in (lora_core, pipelines.models):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            sources.update(path.read_bytes())
    return sources.hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def _checkpoints_activations(model: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
