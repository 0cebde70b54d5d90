"""Lineage in both directions: from a version to its origin, and from data or a base to versions."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipelines.errors import RegistryError
from pipelines.reporting.page_sections import RECIPE
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.connection import READING_ALL, connect, is_denied
from pipelines.tracking.mlmodel import FINGERPRINT
from pipelines.tracking.model_versions import AUTHOR_TAG, FLOW_RUN_TAG, all_versions
from pipelines.tracking.move_log import ADAPTER_TAG
from pipelines.tracking.references import aliases_of
from pipelines.tracking.runs import PARENT_TAG, find_run
from pipelines.tracking.tag_names import tags_of

CANDIDATE_RUN_TAG = "candidate_run"
"""On a copied version: the run of the candidate that it was copied from."""
REPORT = "report.html"
MIN_DIGEST = 8
"""Characters of a digest that identify it."""


class Lineage(Values):
    """Where a version comes from."""

    base: str
    base_revision: str
    base_fingerprints: dict[str, str]
    """Kind of weights → fingerprint."""
    quantization: str
    data_digest: str
    seed: str
    commit: str
    comparison: str
    training_stage: str
    author: str
    flow_run: str
    """Id of the Prefect flow run that registered it; empty if it is not known."""
    run: str
    """Id of the MLflow run with the version's files."""
    recipe: str = ""
    """MLflow's address of the recipe; empty if it is not known."""
    report: str = ""
    """MLflow's address of the report."""


class DerivedVersion(Values):
    """A version that was derived from some data or a base."""

    name: str
    version: str
    aliases: tuple[str, ...]
    verdict: str
    adapter_sha256: str
    base: str
    data_digest: str


def lineage_of(version: ModelVersion, client: MlflowClient | None = None) -> Lineage:
    """Return the lineage of a version; recipe and report only with a client."""
    tags = tags_of(version)
    fingerprints = {}
    for tag in sorted(tags):
        if tag.startswith(FINGERPRINT):
            fingerprints[tag.removeprefix(FINGERPRINT)] = tags[tag]
    parent = None if client is None else _comparison_run(client, version)
    artifacts = "" if parent is None else f"runs:/{parent}/"
    return Lineage(
        base=tags.get("base", ""),
        base_revision=tags.get("base_revision", ""),
        base_fingerprints=fingerprints,
        quantization=tags.get("quantization", ""),
        data_digest=tags.get("data_digest", ""),
        seed=tags.get("seed", ""),
        commit=tags.get("commit", ""),
        comparison=tags.get("comparison", ""),
        training_stage=tags.get("training_stage", ""),
        author=tags.get(AUTHOR_TAG, ""),
        flow_run=tags.get(FLOW_RUN_TAG, ""),
        run=version.run_id or "",
        recipe=artifacts and artifacts + RECIPE,
        report=artifacts and artifacts + REPORT,
    )


def derived_from_data(digest: str, runs: Path) -> list[DerivedVersion]:
    """Return every version that was trained on data with a digest, or with its first characters.

    Raises:
        RegistryError: the digest is too short.
    """
    _check_length(digest)
    with connect(runs, READING_ALL) as client:
        found = []
        for version in all_versions(client):
            if tags_of(version).get("data_digest", "").startswith(digest):
                found.append(version)
        return _derived(client, found)


def derived_from_base(base: str, runs: Path) -> list[DerivedVersion]:
    """Return every version that was trained on a base.

    Args:
        base: its id, or a fingerprint of it, or the first characters of one.
        runs: folder of all runs.
    """
    with connect(runs, READING_ALL) as client:
        found = [version for version in all_versions(client) if _is_of_base(version, base)]
        return _derived(client, found)


def _is_of_base(version: ModelVersion, base: str) -> bool:
    if version.tags.get("base") == base:
        return True
    if len(base) < MIN_DIGEST:
        return False
    for fingerprint in lineage_of(version).base_fingerprints.values():
        method, _, digest = fingerprint.rpartition(":")
        if fingerprint.startswith(base) or (method and digest.startswith(base)):
            return True
    return False


def _check_length(digest: str) -> None:
    if len(digest) < MIN_DIGEST:
        raise RegistryError(
            f"{digest!r} has {len(digest)} characters; give at least the first {MIN_DIGEST} of a "
            "digest, which `lora registry show` prints"
        )


def _derived(client: MlflowClient, versions: list[ModelVersion]) -> list[DerivedVersion]:
    aliases = {}
    for name in {version.name for version in versions}:
        aliases[name] = aliases_of(client, name)
    found = []
    for version in versions:
        tags = tags_of(version)
        number = str(version.version)
        held = [alias for alias, at in aliases[version.name].items() if at == number]
        derived = DerivedVersion(
            name=version.name,
            version=number,
            aliases=tuple(sorted(held)),
            verdict=tags.get("verdict", ""),
            adapter_sha256=tags.get(ADAPTER_TAG, ""),
            base=tags.get("base", ""),
            data_digest=tags.get("data_digest", ""),
        )
        found.append(derived)
    return found


def _comparison_run(client: MlflowClient, version: ModelVersion) -> str | None:
    """Return the id of the run of a version's last comparison; None if it is gone or not readable.

    The files of a copied version are in a run of their own, and its readers need no permission for
    the experiment of the comparison.
    """
    tags = tags_of(version)
    comparison = tags.get("comparison")
    run = tags.get(CANDIDATE_RUN_TAG, version.run_id)
    if not run or not comparison:
        return None
    try:
        experiment = client.get_run(run).info.experiment_id
        found = find_run(client, experiment, {PARENT_TAG: comparison})
    except MlflowException as error:
        if CANDIDATE_RUN_TAG in tags and is_denied(error):
            return None
        raise
    return None if found is None else str(found.info.run_id)
