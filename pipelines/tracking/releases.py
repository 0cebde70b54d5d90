"""Promotion across a pair of names: a version of `NAME-candidates` is copied into `NAME`.

MLflow grants creating versions and moving aliases with the same permission, so a review needs two
names. Trainers write to the first one, a promoter to the second one, and users read only that.

A copy has its own files, in a run of the experiment `NAME-releases`. MLflow's copy_model_version
would share those of the candidate's run: trainers may write there, a later run replaces card and
evidence there, and users of the model would need a permission for the trainers' experiment.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.entities.model_registry import ModelVersion

from pipelines.config.alias_names import CHAMPION, PROPOSED
from pipelines.config.registry_names import REGISTERED, champion_model, releases_experiment
from pipelines.errors import RegistryError
from pipelines.tracking import version_files
from pipelines.tracking.aliases import registered_version
from pipelines.tracking.connection import connect, editing
from pipelines.tracking.decisions import check_promotable, promote_open
from pipelines.tracking.history import REJECTED_TAG, RETIRED_TAG, History, record_version
from pipelines.tracking.lease import hold_lease
from pipelines.tracking.lineage import CANDIDATE_RUN_TAG
from pipelines.tracking.model_card import FILE as CARD
from pipelines.tracking.model_versions import ensure_model, update_tags, versions_of
from pipelines.tracking.move_log import ADAPTER_TAG
from pipelines.tracking.open_decision import DecisionResult, Grounds, open_decision
from pipelines.tracking.references import Reference
from pipelines.tracking.registry import download_version
from pipelines.tracking.runs import experiment_id, find_or_create_run
from pipelines.tracking.tag_names import stored_tags, tags_of
from pipelines.tracking.version_files import (
    CARD_TAG,
    CONFIG_TAG,
    DOWNLOAD_NOTE,
    EVIDENCE,
    FILES_TAG,
)

COPIED_TAG = "copied_from"
"""On a copied version: NAME-candidates/VERSION."""
RELEASE_TAG = "lora.release"
"""On a run with the files of a copied version: the adapter's digest."""
NOT_COPIED = {REJECTED_TAG, RETIRED_TAG}
"""Tags with decisions about the candidate."""
KEPT = {ADAPTER_TAG, CONFIG_TAG, FILES_TAG, CARD_TAG}
"""Tags of files that a copy has for good, and of the card, which names its own version."""


@dataclass(frozen=True)
class PromotedCandidate:
    """A version that is being promoted, with its verified files."""

    client: MlflowClient
    version: ModelVersion
    folder: Path
    """Its files."""

    @property
    def target(self) -> str:
        """Name of the registered model that gets the copy."""
        return champion_model(str(self.version.name))

    @property
    def sha256(self) -> str:
        """Digest of the adapter."""
        return str(self.version.tags[ADAPTER_TAG])

    def tags(self) -> dict[str, str]:
        """Return the tags of the copy."""
        tags = {}
        for name, value in tags_of(self.version).items():
            if name not in NOT_COPIED:
                tags[name] = value
        tags[COPIED_TAG] = f"{self.version.name}/{self.version.version}"
        tags[CANDIDATE_RUN_TAG] = self.version.run_id or ""
        return tags

    def card(self, version: str) -> str:
        """Return the model card of the copy, which refers to its own version."""
        text = (self.folder / CARD).read_text(encoding="utf-8")
        number = self.version.version
        names = {
            f"{REGISTERED}{self.version.name}/{number}": f"{REGISTERED}{self.target}/{version}",
            f"# {self.version.name}, version {number} (": f"# {self.target}, version {version} (",
            f"- name: {self.version.name}-": f"- name: {self.target}-",
        }
        for before, after in names.items():
            text = text.replace(before, after)
        return text


def promote_candidate(reference: Reference, grounds: Grounds, runs: Path) -> DecisionResult:
    """Copy a candidate into the name that users read, and make the copy the champion there.

    It can be repeated: bytes that were copied before are not copied again.

    Args:
        reference: of a version of NAME-candidates.
        grounds: why.
        runs: folder of all runs.

    Raises:
        RegistryError: the version failed the gate, was rejected or retired, was compared with
            another champion, was deleted from NAME, or has other files than were registered.
            `force` overrides all but the last.
    """
    target = champion_model(reference.name)
    with connect(runs, editing(target)) as client, tempfile.TemporaryDirectory() as scratch:
        version = reference.resolve(client)
        if not grounds.force:
            check_promotable(version, registered_version(client, target, CHAMPION))
        candidate = PromotedCandidate(client, version, download_version(version, Path(scratch)))
        (candidate.folder / DOWNLOAD_NOTE).unlink(missing_ok=True)
        _check_documents(candidate)
        copy = _copied(candidate, grounds, runs)
        with open_decision(client, copy, "promote", grounds) as decision:
            result = decision.result(promote_open(decision, CHAMPION))
        _close_proposal(candidate, grounds)
        return result


def _check_documents(candidate: PromotedCandidate) -> None:
    version = candidate.version
    problem = version_files.document_objection(tags_of(version), candidate.folder)
    if problem is not None:
        raise RegistryError(
            f"version {version.version} of {version.name} {problem}: it was changed after it was "
            "registered, or a run is registering it now; run the command again"
        )


def _copied(candidate: PromotedCandidate, grounds: Grounds, runs: Path) -> ModelVersion:
    """Return the version with the candidate's bytes in the other name; create it if necessary."""
    client = candidate.client
    target = candidate.target
    ensure_model(client, target, f"LoRA adapters, promoted from {candidate.version.name}")
    with hold_lease(client, target):
        known = versions_of(client, target, candidate.sha256)
        if known and COPIED_TAG not in tags_of(known[0]):
            return known[0]  # registered there by a run: its files are not the promoter's
        if known:
            copy = known[0]
        else:
            _check_not_deleted(candidate, grounds)
            copy = _create_copy(candidate, runs)
        _copy_documents(candidate, copy)
        record_version(client, target, candidate.sha256, str(copy.version))
        return client.get_model_version(target, str(copy.version))


def _check_not_deleted(candidate: PromotedCandidate, grounds: Grounds) -> None:
    deleted = History.read(candidate.client, candidate.target).versions.get(candidate.sha256)
    if deleted is not None and not grounds.force:
        raise RegistryError(
            f"version {deleted} of {candidate.target} with the same bytes was deleted; add --force "
            "with your reason to promote it again"
        )


def _create_copy(candidate: PromotedCandidate, runs: Path) -> ModelVersion:
    """Create a version with its own files; a run that an interrupted copy left is used again."""
    client = candidate.client
    experiment = experiment_id(client, releases_experiment(candidate.target), runs)
    name = f"{candidate.version.name}-{candidate.version.version}"
    run = find_or_create_run(client, experiment, name, {RELEASE_TAG: candidate.sha256})
    run_id = run.info.run_id
    client.log_artifacts(run_id, str(candidate.folder), "adapter")
    _copy_scores(candidate, run)
    client.set_terminated(run_id)
    source = f"{run.info.artifact_uri}/adapter"
    tags = stored_tags(candidate.tags())
    return client.create_model_version(candidate.target, source, run_id, tags=tags)


def _copy_scores(candidate: PromotedCandidate, run: Run) -> None:
    """Log the last value of each score of the candidate's run; training curves stay there."""
    if not candidate.version.run_id:
        return
    scores: Mapping[str, float] = candidate.client.get_run(candidate.version.run_id).data.metrics
    metrics = []
    for name, value in sorted(scores.items()):
        if not name.startswith(("train/", "system/")):
            metrics.append(Metric(name, value, run.info.start_time, 0))
    if metrics:
        candidate.client.log_batch(run.info.run_id, metrics=metrics)


def _copy_documents(candidate: PromotedCandidate, copy: ModelVersion) -> None:
    """Write card and evidence into a copy's files, then all tags."""
    client = candidate.client
    evidence = candidate.folder / EVIDENCE
    if evidence.is_dir():
        client.log_artifacts(str(copy.run_id), str(evidence), f"adapter/{EVIDENCE}")
    tags = {}
    for name, value in candidate.tags().items():
        if name not in KEPT:
            tags[name] = value
    if (candidate.folder / CARD).is_file():
        text = candidate.card(str(copy.version))
        client.log_text(str(copy.run_id), text, f"adapter/{CARD}")
        tags[CARD_TAG] = hashlib.sha256(text.encode()).hexdigest()
    update_tags(client, copy, tags)
    client.update_model_version(copy.name, str(copy.version), candidate.version.description)


def _close_proposal(candidate: PromotedCandidate, grounds: Grounds) -> None:
    """Remove the alias `proposed` from a candidate that was promoted, and log it there."""
    version = candidate.version
    proposed = registered_version(candidate.client, version.name, PROPOSED)
    if proposed is None or proposed.version != version.version:
        return
    with open_decision(candidate.client, version, "promote", grounds) as decision:
        if decision.position_of(PROPOSED) == decision.position:
            decision.move(PROPOSED, decision.position, None)
