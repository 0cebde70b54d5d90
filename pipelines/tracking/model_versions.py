"""Versions and aliases of the registered model.

A version has the files of the adapter and its card only. It is looked up by the adapter's digest
before it is created. Aliases move last: `champion` only to an adapter that passed the gate, and
only from the version that it was compared with.
"""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.comparison.document import Summary
from pipelines.errors import RegistryError
from pipelines.reporting.model_parts import status_of, training_of
from pipelines.tracking import logged
from pipelines.tracking.comparison_runs import log_card

MAX_ADAPTER_FRACTION = 0.5
"""Files larger than this fraction of the base's weights in 2 bytes are not an adapter."""
ADAPTER_TAG = "adapter_sha256"
CANDIDATE = "candidate"
CHAMPION = "champion"


def register_version(client: MlflowClient, summary: Summary, label: str, run_id: str) -> int | None:
    """Register an adapter, or update the tags and the card of the version with the same bytes.

    Returns:
        The version. None for a rejected adapter: it gets no version, and its run has its files.
    """
    model = summary.models[label]
    name = summary.recipe.registry.model
    tags = logged.version_tags(summary, label)
    adapter = Path(training_of(model).folder) / "adapter"
    _check_adapter_size(adapter, summary.base.weights)
    if not client.search_registered_models(_name_query(name)):
        description = f"LoRA adapters of the recipe {summary.name}"
        client.create_registered_model(name, description=description)
    for known in client.search_model_versions(_name_query(name)):
        if known.tags.get(ADAPTER_TAG) == tags[ADAPTER_TAG]:
            # the version's files are in the run that registered it
            log_card(client, known.run_id or run_id, summary, label)
            _update_tags(client, name, known, tags)
            return int(known.version)
    if status_of(model) == "reject":
        return None
    source = f"{client.get_run(run_id).info.artifact_uri}/adapter"
    return int(client.create_model_version(name, source, run_id, tags=tags).version)


def _update_tags(
    client: MlflowClient, name: str, version: ModelVersion, tags: dict[str, str]
) -> None:
    for key in sorted(tags):
        if version.tags.get(key) != tags[key]:
            client.set_model_version_tag(name, version.version, key, tags[key])


def move_aliases(
    client: MlflowClient, summary: Summary, versions: dict[str, int]
) -> dict[str, int]:
    """Point the aliases at the adapters that are put forward; return alias → version.

    MLflow moves one alias at a time. The champion's is the last.
    """
    name = summary.recipe.registry.model
    aliases = {}
    for alias, label in ((CANDIDATE, summary.candidate), (CHAMPION, summary.champion)):
        if label is not None:
            aliases[alias] = versions[label]
    for alias, version in aliases.items():
        if alias == CHAMPION:
            registered = registered_version(client, name, CHAMPION)
            _check_champion_was_compared(summary, registered)
        client.set_registered_model_alias(name, alias, str(version))
    return aliases


def registered_version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version with an alias; None if the model or the alias does not exist."""
    found = client.search_registered_models(_name_query(name))
    version = found[0].aliases.get(alias) if found else None
    return None if version is None else client.get_model_version(name, str(version))


def _name_query(name: str) -> str:
    """Return the search query for a name, which may contain an apostrophe."""
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


def check_champion_passed(summary: Summary) -> None:
    """Raise RegistryError if the champion of the summary did not pass the gate."""
    label = summary.champion
    if label is None:
        return
    status = status_of(summary.models[label])
    if status != "pass":
        raise RegistryError(
            f"{label} is named champion, but its verdict is {status!r}; "
            "only an adapter that passes can be champion: run the comparison again"
        )


def _check_champion_was_compared(summary: Summary, registered: ModelVersion | None) -> None:
    """Raise RegistryError if the champion was replaced or removed after the comparison started."""
    if summary.recipe.gate.min_gain_over_champion is None:
        return
    champion = summary.registered_champion
    compared = {None if champion is None else champion.adapter_sha256}
    for model in summary.adapters.values():
        compared.add(training_of(model).result.saved.adapter_sha256)
    sha256 = None if registered is None else registered.tags.get(ADAPTER_TAG)
    if sha256 in compared:
        return
    name = summary.recipe.registry.model
    now = "has no champion"
    if registered is not None:
        now = f"has version {registered.version} as its champion"
    then = "none" if champion is None else f"version {champion.version}"
    raise RegistryError(
        f"{name} {now}, but {summary.champion} was compared with {then}; "
        "run the recipe again to compare it with the champion that is registered now. "
        f"Everything is registered, and the alias {CHAMPION} has not moved"
    )


def _check_adapter_size(adapter: Path, base_weights: int) -> None:
    size = sum(path.stat().st_size for path in adapter.iterdir())
    limit = MAX_ADAPTER_FRACTION * 2 * base_weights
    if size > limit:
        raise RegistryError(
            f"{adapter} has {size:,} bytes, near the size of a base "
            f"(the limit is {limit:,.0f} bytes); lower the rank"
        )
