"""What the registration after a training needs, checked before the first training.

    names        MLflow accepts the name of the experiment, and nobody has deleted it
    registry     this user may read and change the registered model, or create it
    experiment   this user may read and change the experiment
    artifacts    a small file can be written, read and deleted where files are stored
    sizes        no adapter is near the size of its base

Every write is undone at once. A permission is tested by what it permits: with a tag if the object
exists, and with a registered model of another name if it does not.
"""

import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipelines.console import print_status
from pipelines.errors import RecipeError, RegistryError, UnreachableError, one_line
from pipelines.tracking.connection import Access, connect, is_denied
from pipelines.tracking.model_versions import MAX_ADAPTER_FRACTION
from pipelines.tracking.references import ABSENT
from pipelines.tracking.runs import artifact_folder

CHECK = "lora-access-check-"
"""Start of the names of what a check writes and removes."""
DEFAULT_EXPERIMENT = "0"
"""Id of the experiment that every server has; it shows where a new experiment stores its files."""
MAX_EXPERIMENT_NAME = 500
"""Characters that MLflow accepts."""
CONTENT = b"Written and removed by a check before a training.\n"
LOCAL = ("", "file")
"""Schemes of folders."""
PACKAGES = {"boto3": "lora-pipeline[s3]", "google": "google-cloud-storage"}
"""Module of an artifact store → what to install."""


class ArtifactStore(Protocol):
    """What MLflow's repositories of files do; MLflow itself annotates only a part of it."""

    def log_artifact(self, local_file: str, artifact_path: str) -> None:
        """Write a file to a folder of the store."""

    def download_artifacts(self, artifact_path: str, dst_path: str) -> str:
        """Read a file; return its path on this host."""
        ...

    def list_artifacts(self) -> object:
        """Return the files."""

    def delete_artifacts(self, artifact_path: str) -> None:
        """Delete a folder with its files."""


def check_access(model: str, experiment: str, runs: Path) -> None:
    """Check that this user can register adapters.

    Args:
        model: name of the registered model.
        experiment: name of the experiment.
        runs: folder of all runs; has the SQLite file unless a server is configured.

    Raises:
        RecipeError: the name of the experiment cannot be used.
        UnreachableError: the server does not answer.
        RegistryError: it refuses, or the store of files does.
    """
    check_experiment_name(experiment)
    artifact_folder(runs, experiment)  # raises if it is not below the folder of runs
    with connect(runs, Access("EDIT", model, experiment)) as client:
        _check_registered_model(client, model)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            _check_experiment(client, found)
            _check_artifacts(found.artifact_location)
        else:
            _check_new_experiment(client)


def check_experiment_name(name: str) -> None:
    """Raise RecipeError if an experiment cannot have this name."""
    problem = ""
    if not name.isprintable():
        problem = "has a control character"
    elif name != name.strip() or not name:
        problem = "is empty or has spaces at its ends"
    elif len(name) > MAX_EXPERIMENT_NAME:
        problem = f"has {len(name)} characters"
    elif ".." in name.split("/"):
        problem = "leads out of the folder of artifacts"
    if problem:
        raise RecipeError(
            f"registry.experiment {name[:60]!r} {problem}: the name of an experiment has at most "
            f"{MAX_EXPERIMENT_NAME} printable characters and no '..'; choose another"
        )


def check_adapter_sizes(file_bytes: Mapping[str, int], base_weights: int) -> None:
    """Check that the registry would accept every adapter.

    Args:
        file_bytes: label of an adapter → expected size of its file.
        base_weights: number of weights of the base.

    Raises:
        RecipeError: an adapter is near the size of its base.
    """
    limit = MAX_ADAPTER_FRACTION * 2 * base_weights
    large = {label: size for label, size in file_bytes.items() if size > limit}
    if large:
        listed = ", ".join(f"{label} with {size:,} bytes" for label, size in large.items())
        largest = min(size / limit for size in large.values())
        raise RecipeError(
            f"{listed} would be near the size of the base, and the registry takes adapters of at "
            f"most {limit:,.0f} bytes ({MAX_ADAPTER_FRACTION:.0%} of the base in 16 bits); lower "
            f"lora.ranks by a factor of {largest:.1f} or more, or train fewer modules"
        )


def _check_registered_model(client: MlflowClient, name: str) -> None:
    """Change the registered model and undo it; without one, create and delete another.

    A server that shows nothing by default also denies reading a model that does not exist. Only
    creating it shows the difference.
    """
    unique = CHECK + uuid4().hex
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code in ABSENT:
            _create_and_delete(client, unique)
        elif not is_denied(error) or not _create_and_delete(client, name):
            raise
        return
    client.set_registered_model_tag(name, unique, "")
    client.delete_registered_model_tag(name, unique)


def _create_and_delete(client: MlflowClient, name: str) -> bool:
    """Create a registered model and delete it at once; return False if it existed before."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
        return False
    client.delete_registered_model(name)
    return True


def _check_experiment(client: MlflowClient, experiment: Experiment) -> None:
    number = experiment.experiment_id
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        raise RegistryError(
            f"the experiment {experiment.name} was deleted, so that it takes no runs; restore it "
            f"with `mlflow experiments restore --experiment-id {number}`, or give "
            "registry.experiment another name"
        )
    tag = CHECK + uuid4().hex
    client.set_experiment_tag(number, tag, "")
    client.delete_experiment_tag(number, tag)


def _check_new_experiment(client: MlflowClient) -> None:
    """Check the store of a new experiment's files, as far as the default experiment shows it."""
    try:
        location = client.get_experiment(DEFAULT_EXPERIMENT).artifact_location
        _check_artifacts(location)
    except (MlflowException, OSError) as error:
        is_absent = isinstance(error, MlflowException) and error.error_code in ABSENT
        if not is_absent and not is_denied(error):
            raise
        print_status(
            "where the files of a new experiment are stored is checked when it has its first run",
            mark="…",
        )


def _check_artifacts(location: str) -> None:
    """Write, read and delete a small file.

    A user without the permission to delete files only lists them, so that nothing is left.

    Raises:
        RegistryError: a package is missing, or the store does not answer or refuses.
    """
    if urlsplit(location).scheme in LOCAL:
        _check_local_folder(Path(url2pathname(urlsplit(location).path)))
        return
    folder = CHECK + uuid4().hex
    with _store_errors(location):
        store: ArtifactStore = get_artifact_repository(location)
        try:
            store.delete_artifacts(folder)  # nothing is there yet
        except (MlflowException, OSError) as error:
            if not is_denied(error):
                raise
            store.list_artifacts()
            return
        _write_and_read(store, folder)


def _write_and_read(store: ArtifactStore, folder: str) -> None:
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "check.txt"
        file.write_bytes(CONTENT)
        try:
            store.log_artifact(str(file), folder)
            target = Path(temporary) / "read"
            target.mkdir()
            copy = store.download_artifacts(posixpath.join(folder, file.name), str(target))
            is_same = Path(copy).read_bytes() == CONTENT
        except BaseException:
            with suppress(Exception):  # the first error has the reason
                store.delete_artifacts(folder)
            raise
        store.delete_artifacts(folder)
    if not is_same:
        raise RegistryError("the store returns other bytes than were written to it")


def _check_local_folder(folder: Path) -> None:
    """Write and delete a file in a folder, or in the one in which it would be created."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with TemporaryDirectory(dir=existing, prefix=f".{CHECK}"):
            pass
    except OSError as error:
        raise RegistryError(
            f"MLflow's clients write their files to {folder}, and this user cannot write to "
            f"{existing} ({error.strerror}); let MLflow's server store them with "
            f"--artifacts-destination, or make the folder writable here"
        ) from error


@contextmanager
def _store_errors(location: str) -> Iterator[None]:
    """Raise the errors of a store of files as RegistryError; those of MLflow's server pass."""
    try:
        yield
    except ImportError as error:
        module = (error.name or str(error)).partition(".")[0]
        package = PACKAGES.get(module, module)
        raise RegistryError(
            f"MLflow's files are stored at {location}, and the package {module} is missing, which "
            f"clients need to write there; install it with `pip install '{package}'`, or let "
            f"MLflow's server store files with --artifacts-destination"
        ) from error
    except (RegistryError, UnreachableError):
        raise
    except Exception as error:  # each store has its own library with its own errors
        if is_denied(error):
            raise
        raise RegistryError(
            f"the files of the experiment cannot be written to and read from {location} "
            f"({one_line(error, limit=300)}); check the address and the account of the store"
        ) from error
