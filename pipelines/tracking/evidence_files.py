"""The evidence of a version: the records and the recipe that its verdict is computed from.

    evidence/summary.json    the comparison with its recipe, without what is stored elsewhere
    evidence/items.json      label → item records, of every compared model and of the champion

Items that one model could not score are left out already, so that models of the frontier, which are
not stored, do not matter. Distributions are not stored: a KL divergence is never judged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipelines.comparison.document import ModelSummary, Summary, read_summary
from pipelines.comparison.record_files import TaggedRecord, json_line, read_items
from pipelines.comparison.record_types import ItemRecord
from pipelines.comparison.records import align
from pipelines.errors import RegistryError, one_line
from pipelines.reporting.model_parts import training_of
from pipelines.runtime.interfaces.results import SplitOverlap

SUMMARY = "summary.json"
ITEMS = "items.json"
RECORDS = TypeAdapter[dict[str, list[ItemRecord]]](
    dict[str, list[TaggedRecord]], config=ConfigDict(extra="forbid", strict=True)
)


@dataclass(frozen=True)
class VersionEvidence:
    """What a version's verdict is computed from."""

    summary: Summary
    items: dict[str, list[ItemRecord]]
    """Label → records."""

    def label_of(self, adapter_sha256: str) -> str:
        """Return the label of an adapter in the comparison.

        Raises:
            RegistryError: the comparison is of other adapters.
        """
        for label, model in self.summary.adapters.items():
            if training_of(model).result.saved.adapter_sha256 == adapter_sha256:
                return label
        raise RegistryError(f"the evidence is of other adapters than {adapter_sha256[:12]}")


def evidence_of(summary: Summary) -> VersionEvidence:
    """Return the evidence of the adapters of a comparison, from the files that it names."""
    items = align({label: read_items(Path(file)) for label, file in summary.items.items()})
    champion = summary.registered_champion
    kept = {} if champion is None else {champion.label}
    labels = [label for label in items if label in summary.models or label in kept]
    return VersionEvidence(_stored(summary), {label: items[label] for label in labels})


def evidence_texts(evidence: VersionEvidence) -> dict[str, str]:
    """Return the content of the files by name."""
    return {
        SUMMARY: evidence.summary.model_dump_json(indent=2) + "\n",
        ITEMS: _items_text(evidence.items),
    }


def _items_text(items: Mapping[str, Sequence[ItemRecord]]) -> str:
    """Return the records as a JSON object with a line for each record."""
    parts = []
    for label, records in items.items():
        lines = ",\n".join(json_line(record).strip() for record in records)
        parts.append(f"{json.dumps(label, ensure_ascii=False)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_evidence(folder: Path) -> VersionEvidence:
    """Read the files of a version's evidence.

    Raises:
        PipelineError: a file is missing, or is not what this release writes.
    """
    path = folder / ITEMS
    summary = read_summary(folder / SUMMARY)
    try:
        return VersionEvidence(summary, RECORDS.validate_json(path.read_bytes()))
    except ValidationError as error:
        raise RegistryError(
            f"{path} does not contain item records ({one_line(error, limit=160)}); register the "
            "version again with the recipe that trained it"
        ) from error


def _stored(summary: Summary) -> Summary:
    """Return a summary without paths, spectra, examples and what follows from the frontier."""
    models = {}
    for label, model in summary.models.items():
        models[label] = _without_paths(model)
    data = summary.data.model_copy(update={"previews": (), "overlap": SplitOverlap()})
    removed = {
        "models": models,
        "data": data,
        "base": summary.base.model_copy(update={"folder": ""}),
        "items": {},
        "frontier": (),
        "recommended": None,
        "stages": (),
        "seconds": 0.0,
        "registered": None,
    }
    return summary.model_copy(update=removed)


def _without_paths(model: ModelSummary) -> ModelSummary:
    """Return a model without the folder of its training and without the spectrum of its update."""
    if model.training is None:
        return model
    result = model.training.result
    saved = result.saved.model_copy(update={"spectrum": ()})
    result = result.model_copy(update={"saved": saved})
    training = model.training.model_copy(update={"folder": "", "result": result})
    return model.model_copy(update={"training": training})
