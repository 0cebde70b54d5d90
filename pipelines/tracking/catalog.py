"""What is registered: names, versions, their history, and how two versions differ. Read only."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.config.alias_names import CHAMPION, PROPOSED
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking import history
from pipelines.tracking.connection import READING_ALL, connect, reading
from pipelines.tracking.history import History
from pipelines.tracking.lineage import Lineage, lineage_of
from pipelines.tracking.model_versions import PAGE, all_versions
from pipelines.tracking.move_log import ADAPTER_TAG, AliasMove, number_in
from pipelines.tracking.references import Reference, aliases_of, existing_model
from pipelines.tracking.tag_names import tags_of
from pipelines.tracking.version_files import CONFIG_TAG, EVIDENCE_TAG, FILES_TAG

Decision = Literal["", "rejected", "retired"]
DIGEST_TAGS = (ADAPTER_TAG, CONFIG_TAG, FILES_TAG, EVIDENCE_TAG)


class CatalogEntry(Values):
    """A registered model."""

    name: str
    versions: int
    aliases: dict[str, str]
    """Alias → version."""
    last_move: AliasMove | None
    """None if no alias was moved."""

    @property
    def champion(self) -> str | None:
        """Version of the champion; None if there is none."""
        return self.aliases.get(CHAMPION)

    @property
    def proposed(self) -> str | None:
        """Version that waits for a decision; None if there is none."""
        return self.aliases.get(PROPOSED)


class VersionDetails(Values):
    """A version of a registered model."""

    name: str
    version: str
    created: str
    """In UTC, ISO 8601."""
    aliases: tuple[str, ...]
    decision: Decision
    """Of a person; empty for none."""
    rank: int | None
    file_rank: int | None
    verdict: str
    reason: str
    scores: dict[str, float]
    """Metric → value; those of the version's run."""
    digests: dict[str, str]
    lineage: Lineage


def list_models(runs: Path) -> list[CatalogEntry]:
    """Return the registered models, ordered by name."""
    with connect(runs, READING_ALL) as client:
        counts: dict[str, int] = {}
        for version in all_versions(client):
            counts[version.name] = counts.get(version.name, 0) + 1
        entries = []
        token = None
        while True:
            page = client.search_registered_models(max_results=PAGE, page_token=token)
            for model in page:
                past = History.of_tags(model.name, model.tags)
                aliases = {alias: str(version) for alias, version in model.aliases.items()}
                entry = CatalogEntry(
                    name=model.name,
                    versions=counts.get(model.name, 0),
                    aliases=dict(sorted(aliases.items())),
                    last_move=past.moves[-1] if past.moves else None,
                )
                entries.append(entry)
            token = page.token
            if not token:
                return sorted(entries, key=lambda entry: entry.name)


def show_versions(name: str, runs: Path) -> list[VersionDetails]:
    """Return the versions of a registered model, the first one first; without their scores."""
    with connect(runs, reading(name)) as client:
        aliases = aliases_of(client, name)
        return [_details(version, aliases) for version in all_versions(client, name)]


def show_version(reference: Reference, runs: Path) -> VersionDetails:
    """Return a version with the scores of its run."""
    with connect(runs, reading(reference.name)) as client:
        version = reference.resolve(client)
        details = _details(version, aliases_of(client, reference.name))
        found = {"scores": _scores(client, version), "lineage": lineage_of(version, client)}
        return details.model_copy(update=found)


def history_of(name: str, runs: Path) -> tuple[AliasMove, ...]:
    """Return every recorded move of the aliases, the first one first."""
    with connect(runs, reading(name)) as client:
        return History.of_tags(name, existing_model(client, name).tags).moves


def decision_on(version: ModelVersion) -> Decision:
    """Return what a person decided about a version."""
    if history.is_retired(version):
        return "retired"
    return "rejected" if history.is_rejected(version) else ""


def _details(version: ModelVersion, aliases: Mapping[str, str]) -> VersionDetails:
    tags = tags_of(version)
    number = str(version.version)
    created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    rank = number_in(tags, "rank")
    file_rank = number_in(tags, "file_rank")
    return VersionDetails(
        name=version.name,
        version=number,
        created=created.isoformat(timespec="seconds"),
        aliases=tuple(sorted(alias for alias, held in aliases.items() if held == number)),
        decision=decision_on(version),
        rank=None if rank is None else int(rank),
        file_rank=None if file_rank is None else int(file_rank),
        verdict=tags.get("verdict", ""),
        reason=tags.get("reason", ""),
        scores=_tagged_scores(version),
        digests={name: tags[name] for name in DIGEST_TAGS if name in tags},
        lineage=lineage_of(version),
    )


def _tagged_scores(version: ModelVersion) -> dict[str, float]:
    """Return the two scores in the tags of a version."""
    scores = {}
    for name, tag in (("task/gain", "task_gain"), ("general/change", "general_change")):
        value = number_in(version.tags, tag)
        if value is not None:
            scores[name] = value
    return scores


def _scores(client: MlflowClient, version: ModelVersion) -> dict[str, float]:
    """Return the last value of each score of a version's run, without its training curves."""
    scores = _tagged_scores(version)
    if version.run_id:
        metrics = client.get_run(version.run_id).data.metrics
        for name in sorted(metrics):
            if not name.startswith(("train/", "system/")):
                scores.setdefault(name, metrics[name])
    return scores
