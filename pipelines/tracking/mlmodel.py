"""The MLmodel file of a version, with which mlflow.pyfunc loads it.

The file refers to the base by id, revision and fingerprint, and to the code that loads the adapter
by its module, which this package has. It follows from the tags of the version alone, so that a
repeated upload does not change it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from pydantic import ValidationError

from pipelines.errors import RegistryError, one_line
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.move_log import ADAPTER_TAG

MLMODEL = "MLmodel"
LOADER = "pipelines.workflow.pyfunc_model"
"""The module that loads a version."""
FINGERPRINT = "base_fingerprint."
"""Start of the tags with the fingerprints of the base."""
MAX_NEW_TOKENS = 64
"""The default of the parameter `max_new_tokens`."""
FLAVOR = {
    "loader_module": LOADER,
    "config": {"base": "", "trust_remote_code": False},
}
"""Of mlflow.pyfunc; `config` lists what its `model_config` may replace."""


class ModelReferences(Values):
    """What a version consists of, as its MLmodel file states it."""

    adapter_sha256: str
    """Of the weights."""
    base: str
    base_revision: str
    base_fingerprints: dict[str, str]
    """Kind of weights → fingerprint."""
    quantization: str

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> "ModelReferences":
        """Return the references of a version with these tags."""
        fingerprints = {}
        for tag in sorted(tags):
            if tag.startswith(FINGERPRINT):
                fingerprints[tag.removeprefix(FINGERPRINT)] = tags[tag]
        return cls(
            adapter_sha256=tags.get(ADAPTER_TAG, ""),
            base=tags.get("base", ""),
            base_revision=tags.get("base_revision", ""),
            base_fingerprints=fingerprints,
            quantization=tags.get("quantization", ""),
        )


def mlmodel_text(tags: Mapping[str, str]) -> str:
    """Return the MLmodel file of a version with these tags."""
    signature = ModelSignature(
        # without a name, so that a list is accepted, and a column of messages
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string, "answer")]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, MAX_NEW_TOKENS)]),
    )
    values = {
        "flavors": {"python_function": FLAVOR},
        "metadata": ModelReferences.of_tags(tags).plain(),
        "signature": signature.to_dict(),
    }
    text: str = yaml.safe_dump(values, sort_keys=True, allow_unicode=True)
    return text


def read_references(folder: Path) -> ModelReferences:
    """Return what the MLmodel file of a version states.

    Raises:
        RegistryError: it is missing, or is not what this package writes.
    """
    path = folder / MLMODEL
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_flavors(values)
        return ModelReferences.model_validate(values["metadata"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError, ValueError) as error:
        raise RegistryError(
            f"{path} is not the MLmodel file of an adapter ({one_line(error, limit=160)}); do not "
            "load it, and register the version again with the recipe that trained it"
        ) from error


def mlmodel_objection(tags: Mapping[str, str], folder: Path) -> str | None:
    """Return how a version's MLmodel file differs from its tags; None if it does not.

    A version of an earlier release has no such file.
    """
    if not (folder / MLMODEL).is_file():
        return None
    try:
        found = read_references(folder)
    except RegistryError as error:
        return str(error)
    if found != ModelReferences.of_tags(tags):
        return f"{MLMODEL} names another adapter or base than the tags"
    return None


def _check_flavors(values: Any) -> None:
    """Raise ValueError if a file would run other code, or does not state what it consists of."""
    if not isinstance(values, dict) or not isinstance(values.get("metadata"), dict):
        raise ValueError("it has no metadata")
    if values.get("flavors") != {"python_function": FLAVOR}:
        raise ValueError(f"it must have the flavor python_function with the loader {LOADER} only")
