"""How two versions differ: base, data, recipe and scores."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import mlflow

from pipelines.config.registry_names import REGISTERED
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.catalog import VersionDetails, show_version
from pipelines.tracking.connection import connect, reading
from pipelines.tracking.evidence_files import SUMMARY
from pipelines.tracking.references import Reference
from pipelines.tracking.version_files import EVIDENCE, EVIDENCE_TAG

Part = Literal["base", "data", "config", "scores"]


class VersionDifference(Values):
    """A value that differs between two versions."""

    part: Part
    name: str
    before: str | float | None
    """In the first version; None if it has no such value."""
    after: str | float | None


class VersionDiff(Values):
    """Two versions, and what differs."""

    before: VersionDetails
    after: VersionDetails
    differences: tuple[VersionDifference, ...]


def diff_versions(before: Reference, after: Reference, runs: Path) -> VersionDiff:
    """Return how two versions differ, of one registered model or of two."""
    first = show_version(before, runs)
    second = show_version(after, runs)
    differences = [
        *_differences("base", _base(first), _base(second)),
        *_differences("data", _data(first), _data(second)),
        *_differences("config", _config(first, runs), _config(second, runs)),
        *_differences("scores", _scores(first), _scores(second)),
    ]
    return VersionDiff(before=first, after=second, differences=tuple(differences))


def _base(version: VersionDetails) -> dict[str, Any]:
    lineage = version.lineage
    values = {"id": lineage.base, "revision": lineage.base_revision}
    for kind, digest in lineage.base_fingerprints.items():
        values[f"fingerprint.{kind}"] = digest
    return values


def _data(version: VersionDetails) -> dict[str, Any]:
    return {"digest": version.lineage.data_digest, "seed": version.lineage.seed}


def _scores(version: VersionDetails) -> dict[str, Any]:
    return {"verdict": version.verdict, **version.scores}


def _config(version: VersionDetails, runs: Path) -> dict[str, Any]:
    """Return rank, code and quantization, and the recipe if the version has its evidence."""
    values: dict[str, Any] = {
        "rank": version.rank,
        "commit": version.lineage.commit,
        "quantization": version.lineage.quantization,
    }
    if EVIDENCE_TAG in version.digests:
        values |= _flat("recipe", _recipe_of(version, runs))
    return values


def _recipe_of(version: VersionDetails, runs: Path) -> Any:
    uri = f"{REGISTERED}{version.name}/{version.version}/{EVIDENCE}/{SUMMARY}"
    with tempfile.TemporaryDirectory() as scratch, connect(runs, reading(version.name)):
        path = mlflow.artifacts.download_artifacts(uri, dst_path=scratch)
        return json.loads(Path(path).read_text(encoding="utf-8"))["recipe"]


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Return nested settings by their dotted names; lists are values."""
    if not isinstance(value, dict):
        return {prefix: value}
    settings: dict[str, Any] = {}
    for name, inner in value.items():
        settings |= _flat(f"{prefix}.{name}", inner)
    return settings


def _differences(
    part: Part, before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[VersionDifference]:
    found = []
    for name in dict.fromkeys([*before, *after]):
        first = _shown(before.get(name))
        second = _shown(after.get(name))
        if first != second:
            found.append(VersionDifference(part=part, name=name, before=first, after=second))
    return found


def _shown(value: Any) -> str | float | None:
    """Return a value as it is compared: numbers as they are, everything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
