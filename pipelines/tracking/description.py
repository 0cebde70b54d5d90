"""The description of a version on MLflow's page: a headline and a table of five rows.

A description that a person wrote or changed is kept: the last line, which the page does not show,
has the digest of what a run wrote.
"""

import hashlib
import re
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipelines.comparison.document import ModelSummary, Summary
from pipelines.reporting.formats import duration, interval_text
from pipelines.reporting.model_parts import judgment_of, total_of, training_of
from pipelines.reporting.origin import FlowRunReference
from pipelines.reporting.report_metrics import general_change
from pipelines.tracking.comparison_view import comparison_page, rank_view

OWN = re.compile(r"(.*)\n\n\[//\]: # \(sha256:([0-9a-f]{64})\)\n", re.DOTALL)
SHORT = 12
"""Characters of a digest on a page."""
MAX_REASON = 200


@dataclass(frozen=True)
class Origin:
    """Where a version comes from."""

    author: str
    flow_run: FlowRunReference
    experiment: str
    """Id of the experiment."""
    parent_run: str
    """Id of the comparison's run; empty if it is not known."""


def description(summary: Summary, label: str, origin: Origin) -> str:
    """Return the description of an adapter's version, in Markdown."""
    model = summary.models[label]
    verdict = judgment_of(model).verdict
    general = general_change(model)
    rows = {
        "Task gain": f"{interval_text(total_of(model).task_gain)} nats per token over the base",
        "General change": "not measured" if general is None else interval_text(general),
        "Base": _base(summary),
        "Data": _data(summary, model),
        "Registered by": _origin(origin),
    }
    lines = [f"**{label}: {verdict.status}** – {verdict.reason[:MAX_REASON]}", ""]
    lines += [f"| | {summary.name} |", "| --- | --- |"]
    for name, value in rows.items():
        lines.append(f"| {name} | {_cell(value)} |")
    return "\n".join(lines)


def describe_version(client: MlflowClient, version: ModelVersion, text: str) -> None:
    """Set the description of a version, unless a person wrote or changed it."""
    digest = _digest(text)
    if is_by_a_person(version.description or ""):
        return
    marked = f"{text}\n\n[//]: # (sha256:{digest})\n"
    if marked != version.description:
        client.update_model_version(version.name, str(version.version), marked)


def is_by_a_person(text: str) -> bool:
    """Return whether a description is other than a run wrote it; an empty one is not."""
    if not text.strip():
        return False
    found = OWN.fullmatch(text)
    return found is None or _digest(found.group(1)) != found.group(2)


def flow_run_link(flow_run: FlowRunReference) -> str:
    """Return a flow run in Markdown: its short id, with a link if it has a page."""
    short = f"flow run {flow_run.id[:SHORT]}"
    return f"[{short}]({flow_run.page})" if flow_run.page else short


def _base(summary: Summary) -> str:
    base = summary.base
    revision = f" at {base.revision[:SHORT]}" if base.revision else ""
    quantized = ", in 4 bits (NF4)" if summary.recipe.base_model.quantization == "nf4" else ""
    return f"{base.id}{revision}{quantized}"


def _data(summary: Summary, model: ModelSummary) -> str:
    totals = training_of(model).result.totals
    data = summary.data
    return (
        f"{summary.recipe.data.title}, {data.train_examples:,} examples, digest "
        f"{data.digest[:SHORT]}; {totals.steps} steps in {duration(totals.training_seconds)}"
    )


def _origin(origin: Origin) -> str:
    parts = [origin.author]
    if origin.flow_run.id:
        parts.append(flow_run_link(origin.flow_run))
    if origin.parent_run:
        parts.append(f"[comparison]({comparison_page(origin.experiment, origin.parent_run)})")
        parts.append(f"[all ranks]({rank_view(origin.experiment, origin.parent_run)})")
    return ", ".join(parts)


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
