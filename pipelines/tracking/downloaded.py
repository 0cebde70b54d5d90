"""Files that MLflow's own functions have downloaded, compared with the registry."""

from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.errors import RegistryError, one_line
from pipelines.tracking import version_files
from pipelines.tracking.tag_names import tags_of
from pipelines.tracking.version_files import DOWNLOAD_NOTE


def check_downloaded(folder: Path) -> None:
    """Compare the files of a version with the digests in the registry that they come from.

    Nothing is compared if they come from no registry. The registry is that of this process, which
    has just sent them.

    Args:
        folder: as MLflow has downloaded it, with a note of the version.

    Raises:
        RegistryError: they differ, or the registry does not have or send their digests.
    """
    note = folder / DOWNLOAD_NOTE
    if not note.is_file():
        return
    name, number = _noted_version(note)
    try:
        tags = tags_of(MlflowClient().get_model_version(name, number))
    except MlflowException as error:
        raise RegistryError(
            f"{folder} is version {number} of {name}, and the registry does not give its digests "
            f"({one_line(error, with_type=False, limit=200)}); load it where the registry answers, "
            "or load the folder of `lora registry pull`"
        ) from error
    for problem in (
        version_files.objection(tags, folder),
        version_files.document_objection(tags, folder),
    ):
        if problem is not None:
            raise RegistryError(
                f"version {number} of {name} {problem}: its files were changed after they were "
                "registered, or the download was; do not use them"
            )


def _noted_version(note: Path) -> tuple[str, str]:
    """Return name and number of the version that MLflow noted."""
    try:
        values = yaml.safe_load(note.read_text(encoding="utf-8"))
        return str(values["model_name"]), str(values["model_version"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise RegistryError(
            f"{note} does not name a version ({one_line(error)}); download the version again"
        ) from error
