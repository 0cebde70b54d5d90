"""The names of a version's tags: MLflow's page shows six of them, programs read all.

MLflow's pages hide tags whose name starts with `mlflow.`. Everything but the tags that a reader
needs, and the decisions that a person writes, is stored under such a name. Versions of an earlier
release have all tags under their plain names.
"""

from collections.abc import Mapping

from mlflow.entities.model_registry import ModelVersion

from pipelines.tracking.history import REJECTED_TAG, RETIRED_TAG
from pipelines.tracking.move_log import ADAPTER_TAG

HIDDEN = "mlflow.lora."
SHOWN = ("verdict", "rank", "task_gain", "general_change", "base", ADAPTER_TAG)
DECISIONS = (REJECTED_TAG, RETIRED_TAG)


def stored_name(name: str) -> str:
    """Return the name under which the registry stores a tag."""
    return name if name in SHOWN or name in DECISIONS else HIDDEN + name


def stored_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags under the names under which the registry stores them."""
    return {stored_name(name): value for name, value in tags.items()}


def tags_of(version: ModelVersion) -> dict[str, str]:
    """Return the tags of a version under their plain names."""
    tags: dict[str, str] = {}
    hidden: dict[str, str] = {}
    for name, value in version.tags.items():
        if name.startswith(HIDDEN):
            hidden[name.removeprefix(HIDDEN)] = value
        else:
            tags[name] = value
    return tags | hidden
