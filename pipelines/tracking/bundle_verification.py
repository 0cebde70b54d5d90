"""Verify a version: its files, its verdict, its tags, its aliases and the log.

files      every file has the digest that was registered
verdict    follows from the item records and the recipe, and is that of the tags
tags       are those that the comparison gives
base       the adapter's own files name the same base
aliases    are where the log left them
log        no entry was changed or removed
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from lora_core.adapter.json_files import read_identity
from lora_core.errors import AdapterError
from pipelines.config.registry_names import REGISTERED
from pipelines.errors import PipelineError
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking import version_files
from pipelines.tracking.connection import connect, reading
from pipelines.tracking.evidence_files import read_evidence
from pipelines.tracking.history import History
from pipelines.tracking.logged import version_tags
from pipelines.tracking.mlmodel import FINGERPRINT, mlmodel_objection
from pipelines.tracking.move_log import ADAPTER_TAG, broken_links
from pipelines.tracking.recomputation import disagreements
from pipelines.tracking.references import Reference
from pipelines.tracking.tag_names import tags_of
from pipelines.tracking.version_files import EVIDENCE, EVIDENCE_TAG, document_tags

VERDICT_CHECKS = ("verdict", "tags")
CHANGED = "the evidence is not the one that was registered"
NOT_STORED = "the version has no evidence; run the recipe that registered it, which stores it"


@dataclass(frozen=True)
class VersionBundle:
    """Everything that the registry stores about a version."""

    name: str
    version: str
    folder: Path
    """Its files."""
    tags: Mapping[str, str]
    aliases: Mapping[str, str]
    """Alias → version, of the registered model."""
    model_tags: Mapping[str, str]
    """Tags of the registered model, with the log."""


class VersionCheck(Values):
    """What was verified."""

    name: str
    problems: tuple[str, ...]
    skipped: str = ""
    """Why it could not be verified; empty if it was."""

    @property
    def status(self) -> str:
        """Return ok, changed or skipped."""
        if self.problems:
            return "changed"
        return "skipped" if self.skipped else "ok"


CheckBundle = Callable[[VersionBundle], VersionCheck]


class VerificationReport(Values):
    """The result for one version."""

    name: str
    version: str
    adapter_sha256: str
    checks: tuple[VersionCheck, ...]

    @property
    def is_intact(self) -> bool:
        """Whether nothing was found to be changed."""
        return all(not check.problems for check in self.checks)


def verify_version(
    reference: Reference, runs: Path, *, further: Sequence[CheckBundle] = ()
) -> VerificationReport:
    """Download a version and verify it.

    Args:
        reference: the version.
        runs: folder of runs.
        further: checks in addition to those of every version.

    Raises:
        RegistryError: there is no such version, or the server does not answer.
    """
    with tempfile.TemporaryDirectory() as scratch, connect(runs, reading(reference.name)) as client:
        bundle = download_bundle(client, reference, Path(scratch))
        report = verify_bundle(bundle)
        added = tuple(check(bundle) for check in further)
        return report.model_copy(update={"checks": (*report.checks, *added)})


def download_bundle(client: MlflowClient, reference: Reference, folder: Path) -> VersionBundle:
    """Download everything that the registry stores about a version."""
    version = reference.resolve(client)
    number = str(version.version)
    uri = f"{REGISTERED}{version.name}/{number}"
    files = mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))
    model = client.get_registered_model(version.name)
    return VersionBundle(
        name=version.name,
        version=number,
        folder=Path(files),
        tags=tags_of(version),
        aliases={alias: str(held) for alias, held in model.aliases.items()},
        model_tags=dict(model.tags),
    )


def verify_bundle(bundle: VersionBundle) -> VerificationReport:
    """Verify what was downloaded."""
    checks = (
        VersionCheck(name="files", problems=tuple(_file_problems(bundle))),
        VersionCheck(name="base", problems=tuple(_base_problems(bundle))),
        *_verdict_checks(bundle),
        *_history_checks(bundle),
    )
    return VerificationReport(
        name=bundle.name,
        version=bundle.version,
        adapter_sha256=bundle.tags.get(ADAPTER_TAG, ""),
        checks=checks,
    )


def _file_problems(bundle: VersionBundle) -> list[str]:
    """Return how the files differ from the digests in the tags."""
    found = []
    for problem in (
        version_files.objection(bundle.tags, bundle.folder),
        version_files.document_objection(bundle.tags, bundle.folder),
        mlmodel_objection(bundle.tags, bundle.folder),
    ):
        if problem is not None:
            found.append(f"the version {problem}")
    if EVIDENCE_TAG in bundle.tags:  # registered by this release, which sets all of them
        digests = version_files.file_tags(bundle.folder) | document_tags(bundle.folder)
        for name in sorted(digests.keys() - bundle.tags.keys()):
            found.append(f"the version has no tag {name}, and its files have that digest")
    return found


def _base_problems(bundle: VersionBundle) -> list[str]:
    """Return how the adapter's sidecar differs from the tags; an adapter may have no sidecar."""
    try:
        identity = read_identity(bundle.folder)
    except AdapterError as error:
        return [str(error)]
    if identity is None:
        return []
    found = []
    if identity.get("adapter_sha256") != bundle.tags.get(ADAPTER_TAG):
        found.append("the sidecar is of other weights")
    recorded = identity.get("base_digests", {})
    for tag, digest in bundle.tags.items():
        kind = tag.removeprefix(FINGERPRINT)
        if tag.startswith(FINGERPRINT) and recorded.get(kind, digest) != digest:
            found.append(f"the sidecar names another base than the tag {tag}")
    return found


def _verdict_checks(bundle: VersionBundle) -> list[VersionCheck]:
    """Return whether verdict and tags follow from the evidence."""
    if not (bundle.folder / EVIDENCE).is_dir() and EVIDENCE_TAG not in bundle.tags:
        return [VersionCheck(name=name, problems=(), skipped=NOT_STORED) for name in VERDICT_CHECKS]
    if document_tags(bundle.folder).get(EVIDENCE_TAG) != bundle.tags.get(EVIDENCE_TAG):
        return [VersionCheck(name=name, problems=(), skipped=CHANGED) for name in VERDICT_CHECKS]
    try:
        evidence = read_evidence(bundle.folder / EVIDENCE)
        label = evidence.label_of(bundle.tags.get(ADAPTER_TAG, ""))
    except (PipelineError, OSError) as error:
        return [VersionCheck(name="verdict", problems=(str(error),))]
    tags = []
    for name, value in version_tags(evidence.summary, label).items():
        if bundle.tags.get(name) != value:
            tags.append(f"the tag {name} is {bundle.tags.get(name)!r}, not {value!r}")
    return [
        VersionCheck(name="verdict", problems=tuple(disagreements(evidence))),
        VersionCheck(name="tags", problems=tuple(tags)),
    ]


def _history_checks(bundle: VersionBundle) -> list[VersionCheck]:
    """Return whether log and aliases agree."""
    try:
        past = History.of_tags(bundle.name, bundle.model_tags)
    except PipelineError as error:
        return [VersionCheck(name="log", problems=(str(error),))]
    return [
        VersionCheck(name="aliases", problems=tuple(_alias_problems(bundle, past))),
        VersionCheck(name="log", problems=tuple(broken_links(bundle.model_tags, past.entries))),
    ]


def _alias_problems(bundle: VersionBundle, past: History) -> list[str]:
    """Return which aliases of the version, now or by the log, are not where the log left them."""
    found = []
    moved = {move.alias for move in past.moves if move.alias}
    for alias in sorted(moved | bundle.aliases.keys()):
        left = past.left_at(alias)
        expected = None if left is None else left.version
        now = bundle.aliases.get(alias)
        is_of_version = bundle.version in (now, expected)
        if is_of_version and now != expected:
            found.append(
                f"the alias {alias} is at {_where(now)}, and the log left it at "
                f"{_where(expected)}: it was moved without `lora registry`"
            )
        other = None if left is None else left.adapter_sha256 != bundle.tags.get(ADAPTER_TAG)
        if other and expected == bundle.version:
            found.append(f"the log records the alias {alias} with other weights")
    return found


def _where(version: str | None) -> str:
    return "no version" if version is None else f"version {version}"
