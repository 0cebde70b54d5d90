"""The model card of one adapter: a README.md in the format of the Hugging Face Hub.

The Hub reads the front matter (huggingface.co/docs/hub/model-cards): base, library, data, results.
It accepts only ids of models and data sets on the Hub, so the card mentions any other base or
source in the text only.
"""

import json
import re
import shlex
from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCardData

from pipelines.comparison.comparison import BASE, CONTROL
from pipelines.comparison.document import ModelSummary, Summary
from pipelines.reporting import page_sections
from pipelines.reporting.formats import duration, interval_text, short_count
from pipelines.reporting.model_parts import judgment_of, training_of
from pipelines.reporting.report_metrics import ReportMetric, report_metrics
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.tracking.logged import peak_rate

FILE = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_METRICS = {
    "bleu": "bleu",
    "chrf": "chrf",
    "rouge_l": "rouge",
    "exact_match": "exact_match",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
}
"""The Hub's names of our metrics; a metric that is not listed keeps our name."""


def card(summary: Summary, label: str, version: int | None = None) -> str:
    """Return the text of the card.

    Args:
        summary: the comparison.
        label: one of the adapters.
        version: of the registered model; None for an adapter that is not registered.
    """
    sections = [
        _introduction(summary, label, version),
        _verdict(summary, label),
        _metrics(summary, label),
        _usage(summary, version),
        _training(summary, label),
        _limits(summary, label),
    ]
    return f"---\n{_front_matter(summary, label)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _trained(summary: Summary, label: str) -> TrainResult:
    return training_of(summary.models[label]).result


def _is_quantized(summary: Summary) -> bool:
    return summary.recipe.base_model.quantization == "nf4"


def _front_matter(summary: Summary, label: str) -> str:
    """Return the front matter as YAML."""
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        tags=_tags(summary),
        model_name=f"{summary.recipe.registry.model}-{label}",
        eval_results=_results(summary, label),
    )
    if HUB_ID.fullmatch(summary.base.id):
        data["base_model"] = summary.base.id
        data["base_model_relation"] = "adapter"
    hub_sources = [name for name in summary.recipe.data.names if HUB_ID.fullmatch(name)]
    if hub_sources:
        data["datasets"] = hub_sources
    return str(data.to_yaml())


def _tags(summary: Summary) -> list[str]:
    tags = ["lora"]
    if _is_quantized(summary):
        tags.append("qlora")
    if summary.recipe.lora.use_dora:
        tags.append("dora")
    return [*tags, "peft"]


def _results(summary: Summary, label: str) -> list[EvalResult]:
    """Return the results on the task and on each benchmark."""
    scores = summary.models[label].scores
    source = summary.recipe.data.title
    source_type = source if HUB_ID.fullmatch(source) else "held-out"
    task = {"perplexity": scores.perplexity, **scores.generation}
    results = _results_on(f"{source}, held-out examples", source_type, task)
    for name, one in scores.benchmarks.items():
        values = {"accuracy": one.accuracy, "choice_probability": one.choice_probability}
        results += _results_on(name, name, values)
    return results


def _results_on(
    name: str, dataset_type: str, values: Mapping[str, float | None]
) -> list[EvalResult]:
    """Return the metrics on one data set that were measured.

    Args:
        name: of the data set, for people.
        dataset_type: its id on the Hub, or a word.
        values: our name of a metric → its value; None if it was not measured.
    """
    results = []
    for metric, value in values.items():
        if value is None:
            continue
        result = EvalResult(
            task_type="text-generation",
            dataset_type=dataset_type,
            dataset_name=name,
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=round(float(value), 4),
        )
        results.append(result)
    return results


def _introduction(summary: Summary, label: str, version: int | None) -> str:
    base = summary.base
    source = summary.recipe.data.title
    revision = f" at revision `{base.revision}`" if base.revision else ""
    precision = "stored in 4 bits (NF4)" if _is_quantized(summary) else "in full precision"
    method = page_sections.training_method(summary, label).partition(" over ")[0]
    weights = short_count(_trained(summary, label).facts.trained_weights)
    name = summary.recipe.registry.model
    title = f"{name}, {label}"
    if version is not None:
        title = f"{name}, version {version} ({label})"
    return (
        f"# {title}\n\n"
        f"An adapter ({method}) for `{base.id}`{revision}, trained over that base {precision} "
        f"on {source}. It has {weights} weights and needs the base."
    )


def _verdict(summary: Summary, label: str) -> str:
    verdict = judgment_of(summary.models[label]).verdict
    role = "It was put forward as champion. " if label == summary.champion else ""
    lines = [f"## Verdict: {verdict.status}\n", f"{role}{summary.control.words}\n"]
    for rule in verdict.rules:
        lines.append(f"- {rule.name}: **{rule.status}** – {rule.reason}")
    if not verdict.rules:
        lines.append(verdict.reason)
    return "\n".join(lines)


def _metrics(summary: Summary, label: str) -> str:
    models = summary.models
    columns = ["Metric", "Base"]
    if CONTROL in models:
        columns.append(CONTROL.capitalize())
    columns += ["This adapter", "Change by training (95 %)", "Total change (95 %)"]
    lines = [
        "## What it learned and what it forgot\n",
        "A change is positive if the model became better. The change by training is relative to",
        "the base it was trained over, the total change to the base in full precision.\n",
        "| " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
    ]
    for metric in report_metrics(models):
        lines.append(_metric_row(metric, models, label))
    return "\n".join(lines)


def _metric_row(metric: ReportMetric, models: Mapping[str, ModelSummary], label: str) -> str:
    unit = f" ({metric.unit})" if metric.unit else ""
    title = metric.title.replace("|", "\\|")  # a user-defined metric may have any name
    cells = [f"{title}{unit}"]
    for name in (BASE, CONTROL, label):
        if name in models:
            value = metric.value(models[name])
            cells.append("–" if value is None else metric.format(value))
    adapter = models[label]
    for change in (metric.change(adapter, "change"), metric.change(adapter, "total")):
        cells.append("–" if change is None else interval_text(change))
    return "| " + " | ".join(cells) + " |"


def _usage(summary: Summary, version: int | None) -> str:
    code = "\n".join(_python_lines(summary))
    source = "The adapter is not registered; `FOLDER` is the folder of this file:"
    adapter = "FOLDER"
    if version is not None:
        adapter = f"models:/{summary.recipe.registry.model}/{version}"
        source = "This command downloads exactly this version and verifies its files:"
    return (
        f"## How to use it\n\n```python\n{code}\n```\n\n"
        "`lora generate` finds the base by itself and refuses a base with other weights. "
        f'{source}\n\n```sh\nlora generate --adapter {shlex.quote(adapter)} "…"\n```'
    )


def _python_lines(summary: Summary) -> list[str]:
    """Return the code that loads the adapter with PEFT."""
    base = summary.base
    name = base.id
    comment = ""
    if not _is_loadable(name):
        name = "BASE"
        comment = f"  # a folder with {base.id}"
    lines = ["from peft import PeftModel"]
    arguments = [_quoted(name)]
    if base.revision:
        arguments.append(f"revision={_quoted(base.revision)}")
    if _is_quantized(summary):
        arguments.append("quantization_config=in_4_bits")
        config = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
        lines += ["from transformers import AutoModelForCausalLM, BitsAndBytesConfig", ""]
        lines += [f"in_4_bits = BitsAndBytesConfig({config})"]
    else:
        lines += ["from transformers import AutoModelForCausalLM", ""]
    lines += [
        f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)}){comment}",
        'model = PeftModel.from_pretrained(base, "FOLDER")  # the folder of this file',
    ]
    return lines


def _is_loadable(base: str) -> bool:
    """Return whether transformers can load a base under this id."""
    is_folder = base.startswith("/") and not base.endswith(".gguf")
    return is_folder or HUB_ID.fullmatch(base) is not None


def _quoted(text: str) -> str:
    """Return a string as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _training(summary: Summary, label: str) -> str:
    facts = _training_facts(summary, label) | _provenance_facts(summary, label)
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    return "## How it was trained\n\n" + "\n".join(lines)


def _training_facts(summary: Summary, label: str) -> dict[str, str]:
    recipe = summary.recipe
    data = summary.data
    trained = _trained(summary, label)
    totals = trained.totals
    time = duration(totals.training_seconds)
    return {
        "Method": _method(summary, label),
        "Peak learning rate": f"{peak_rate(summary, label):g}",
        "Steps": (
            f"{totals.steps} of {recipe.training.batch_size} examples, "
            f"{totals.tokens:,} tokens ({totals.supervised_tokens:,} supervised)"
        ),
        "Time": f"{time} on {summary.machine}, {recipe.launch.processes} process(es)",
        "Optimizer": trained.facts.optimizer,
        "Data": (
            f"{recipe.data.title}, {data.train_examples:,} training examples, "
            f"digest `{data.digest}`"
        ),
        "Weights' SHA-256": f"`{trained.saved.adapter_sha256}`",
    }


def _method(summary: Summary, label: str) -> str:
    lora = summary.recipe.lora
    training = summary.models[label].training
    targets = lora.target_modules
    if training is not None and training.adapter is not None:
        targets = training.adapter.target_modules
    shown = targets if isinstance(targets, str) else list(targets)
    method = page_sections.training_method(summary, label)
    return f"{method}, alpha {lora.alpha:g}, target_modules {shown}"


def _provenance_facts(summary: Summary, label: str) -> dict[str, str]:
    name = summary.recipe.name
    facts = {}
    for kind, digest in summary.base.digests.items():
        facts[f"Fingerprint of the base, {kind}"] = f"`{digest}`"
    for what, text in page_sections.verified(summary, label):
        facts[f"Verified, {what.rpartition(', ')[2]}"] = text
    versions = []
    for library, version in summary.versions.items():
        versions.append(f"{library} {version}")
    return facts | {
        "Seed": str(summary.seed),
        "Commit": f"`{summary.commit}`",
        "Versions": ", ".join(versions),
        "Comparison": f"`{summary.key}`",
        "To repeat it": (
            f"save `{page_sections.RECIPE}` of the MLflow run `{summary.name}` as "
            f"`{name}.yaml`; then, from a checkout of that commit, `lora run {name}.yaml`"
        ),
    }


def _limits(summary: Summary, label: str) -> str:
    model = summary.models[label]
    power = model.power
    unfinished = model.scores.unfinished_answers
    limits = [
        "It works only with the base named above; with other weights its answers are meaningless.",
        "The intervals cover the choice of items, but not the training seed: there was one run.",
        "Public benchmarks may be in the base's training data: read differences, not scores.",
    ]
    if power is not None:
        limits.append(
            f"Forgetting was measured on {power.items:,} questions, which detect a drop of "
            f"{power.smallest_drop:.3f} or more with 80 % power, and no smaller one."
        )
    if unfinished:
        tokens = summary.recipe.evaluation.max_new_tokens
        limits.append(f"{unfinished} of its answers had not ended after {tokens} tokens.")
    return "## Limits\n\n- " + "\n- ".join(limits)
