"""Recompute a version's verdict and scores from its evidence. Needs neither MLflow nor a model.

The comparison is a function of recipe and item records: resamples are deterministic, and every end
of an interval is rounded to six decimals. Libraries for linear algebra may round a sum differently
in its last digits on another processor, so that numbers are compared to nine digits. Texts and
verdicts must be equal.
"""

from math import isclose
from typing import Any

from pipelines.comparison.comparison import (
    ComparedChampion,
    ComparedModel,
    ComparisonContext,
    compare,
)
from pipelines.comparison.document import Comparison, Summary
from pipelines.tracking.evidence_files import VersionEvidence

RELATIVE_TOLERANCE = 1e-9
NOT_STORED = ("kl", "kl_interval")
"""What is computed from distributions."""
COMPARED = (
    "models",
    "candidate",
    "champion",
    "decision",
    "control",
    "registered_champion",
    "general_metric",
)
"""What a comparison contains without the frontier."""
MAX_SHOWN = 60


def recompute(evidence: VersionEvidence) -> Comparison:
    """Return the comparison that follows from the recipe and the item records.

    Raises:
        ValueError: the models were not scored on the same items, or a model has no records.
    """
    summary = evidence.summary
    _check_labels(evidence)
    return compare(summary.recipe, _trained(summary), evidence.items, _context(summary))


def disagreements(evidence: VersionEvidence) -> list[str]:
    """Return how the stored comparison differs from the one that follows from its records."""
    try:
        expected = recompute(evidence)
    except (ValueError, KeyError, AssertionError, ArithmeticError) as error:
        return [f"the records do not give a comparison: {error}"]
    found = []
    stored = evidence.summary.plain()
    computed = expected.plain()
    for name in COMPARED:
        found += _differences(name, stored[name], computed[name])
    return found


def _trained(summary: Summary) -> list[ComparedModel]:
    """Return the trained models of a comparison, in its order."""
    trained = []
    for label, model in summary.models.items():
        one = model.training
        if one is not None:
            compared = ComparedModel(label, one.rank, one.key, one.folder, one.result, one.adapter)
            trained.append(compared)
    return trained


def _context(summary: Summary) -> ComparisonContext:
    rates: dict[float, float | None] = {}
    if summary.control.rates:
        for rate in summary.recipe.control.learning_rate:
            rates[rate] = summary.control.rates[f"{rate:g}"]
    champion = summary.registered_champion
    compared = None
    if champion is not None:
        compared = ComparedChampion(champion.version, champion.adapter_sha256, champion.objection)
    return ComparisonContext(rates=rates, champion=compared)


def _check_labels(evidence: VersionEvidence) -> None:
    """Raise ValueError if a compared model has no records, or records are of no compared model."""
    missing = evidence.summary.models.keys() - evidence.items.keys()
    champion = evidence.summary.registered_champion
    known = set(evidence.summary.models)
    if champion is not None:
        known.add(champion.label)
    unknown = evidence.items.keys() - known
    for label in sorted(missing | unknown):
        raise ValueError(f"{label} is a model without records, or has records and no model")


def _differences(name: str, stored: Any, computed: Any) -> list[str]:
    """Return where two plain values differ, by dotted names."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        found = []
        for key in dict.fromkeys([*stored, *computed]):
            if key not in NOT_STORED:
                found += _differences(f"{name}.{key}", stored.get(key), computed.get(key))
        return found
    if isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        found = []
        for index, (first, second) in enumerate(zip(stored, computed, strict=True)):
            found += _differences(f"{name}.{index}", first, second)
        return found
    if _is_equal(stored, computed):
        return []
    first = str(stored)[:MAX_SHOWN]
    second = str(computed)[:MAX_SHOWN]
    return [f"{name} is {first}, and the records give {second}"]


def _is_equal(stored: Any, computed: Any) -> bool:
    numbers = (int, float)
    if isinstance(stored, bool) or isinstance(computed, bool):
        return stored is computed
    if isinstance(stored, numbers) and isinstance(computed, numbers):
        return isclose(stored, computed, rel_tol=RELATIVE_TOLERANCE, abs_tol=RELATIVE_TOLERANCE)
    return bool(stored == computed)
