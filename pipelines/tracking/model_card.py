"""The model card of one adapter: a README.md in the format of the Hugging Face Hub.

The Hub reads the front matter (huggingface.co/docs/hub/model-cards): base, library, data, results.
It accepts only ids of models and data sets on the Hub, so the card mentions any other base or
source in the text only.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from pipelines.comparison.comparison import BASE, CONTROL
from pipelines.reporting import page_sections, words
from pipelines.reporting.formats import duration, interval_text, short_count
from pipelines.reporting.report_metrics import ReportMetric, report_metrics

Summary = Mapping[str, Any]
Values = dict[str, Any]
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


def card(summary: Summary, label: str) -> str:
    """Return the text of the card.

    Args:
        summary: see `pipelines.comparison.comparison`, with the additional keys `base` and `data`.
        label: one of the adapters.
    """
    front = yaml.safe_dump(_front_matter(summary, label), sort_keys=False, allow_unicode=True)
    sections = [
        _introduction(summary, label),
        _verdict(summary, label),
        _metrics(summary, label),
        _usage(summary, label),
        _training(summary, label),
        _limits(summary, label),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _is_quantized(summary: Summary) -> bool:
    return bool(summary["recipe"]["base_model"]["quantization"] == "nf4")


def _front_matter(summary: Summary, label: str) -> Values:
    recipe = summary["recipe"]
    front: Values = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if HUB_ID.fullmatch(summary["base"]["id"]):
        front |= {"base_model": summary["base"]["id"], "base_model_relation": "adapter"}
    if HUB_ID.fullmatch(recipe["data"]["source"]):
        front["datasets"] = [recipe["data"]["source"]]
    tags = ["lora"]
    if _is_quantized(summary):
        tags.append("qlora")
    if recipe["lora"]["use_dora"]:
        tags.append("dora")
    front["tags"] = [*tags, "peft"]
    name = f"{recipe['registry']['model']}-{label}"
    front["model-index"] = [{"name": name, "results": _results(summary, label)}]
    return front


def _results(summary: Summary, label: str) -> list[Values]:
    """Return the results on the task and on each benchmark, in the Hub's format."""
    scores = summary["models"][label]["scores"]
    source = summary["recipe"]["data"]["source"]
    source_type = source if HUB_ID.fullmatch(source) else "held-out"
    task = {"perplexity": scores["perplexity"], **scores["generation"]}
    results = [_result(source_type, f"{source}, held-out examples", task)]
    for name, one in scores["benchmarks"].items():
        values = {key: one[key] for key in ("accuracy", "choice_probability")}
        results.append(_result(name, name, values))
    return [result for result in results if result["metrics"]]


def _result(kind: str, name: str, values: Mapping[str, float | None]) -> Values:
    """Return the entry of one data set; it has no metrics if nothing was measured."""
    metrics = []
    for key, value in values.items():
        if value is not None:
            metrics.append(
                {
                    "type": HUB_METRICS.get(key, key),
                    "name": key,
                    "value": round(float(value), 4),
                }
            )
    dataset = {"type": kind, "name": name}
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def _introduction(summary: Summary, label: str) -> str:
    recipe = summary["recipe"]
    base = summary["base"]
    name = recipe["registry"]["model"]
    source = recipe["data"]["source"]
    revision = ""
    if base["revision"]:
        revision = f" at revision `{base['revision']}`"
    precision = "stored in 4 bits (NF4)" if _is_quantized(summary) else "in full precision"
    method = page_sections.training_method(summary, label).partition(" over ")[0]
    weights = short_count(summary["models"][label]["figures"]["trained_weights"])
    return (
        f"# {name}, {label}\n\n"
        f"An adapter ({method}) for `{base['id']}`{revision}, trained over that base {precision} "
        f"on {source}. It has {weights} weights and needs the base."
    )


def _verdict(summary: Summary, label: str) -> str:
    verdict = summary["models"][label]["verdict"]
    control = summary["control"]["words"]
    is_champion = label == summary["champion"]
    role = "It was put forward as champion. " if is_champion else ""
    lines = [f"## Verdict: {verdict['status']}\n", f"{role}{control}\n"]
    for rule in verdict["rules"]:
        result = f"**{rule['status']}** – {rule['reason']}"
        lines.append(f"- {rule['name']}: {result}")
    if not verdict["rules"]:
        lines.append(verdict["reason"])
    return "\n".join(lines)


def _metrics(summary: Summary, label: str) -> str:
    models = summary["models"]
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


def _metric_row(metric: ReportMetric, models: Mapping[str, Any], label: str) -> str:
    unit = f" ({metric.unit})" if metric.unit else ""
    title = metric.title.replace("|", "\\|")  # a user-defined metric may have any name
    cells = [f"{title}{unit}"]
    for name in (BASE, CONTROL, label):
        if name in models:
            value = metric.value(models[name])
            text = "–" if value is None else metric.format(value)
            cells.append(text)
    for effect in ("change", "total"):
        change = metric.change(models[label], effect)
        text = "–" if change is None else interval_text(change)
        cells.append(text)
    return "| " + " | ".join(cells) + " |"


def _usage(summary: Summary, label: str) -> str:
    code = "\n".join(_python_lines(summary))
    return (
        f"## How to use it\n\n```python\n{code}\n```\n\n"
        "`lora generate` finds the base by itself and refuses a base with other weights:\n\n"
        f'```sh\nlora generate --adapter {_adapter_uri(summary, label)} "…"\n```'
    )


def _python_lines(summary: Summary) -> list[str]:
    """Return the code that loads the adapter with PEFT."""
    base = summary["base"]
    name = base["id"]
    comment = ""
    if not _is_loadable(name):
        name = "BASE"
        comment = f"  # a folder with {base['id']}"
    lines = ["from peft import PeftModel"]
    arguments = [_quoted(name)]
    if base["revision"]:
        arguments.append(f"revision={_quoted(base['revision'])}")
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


def _adapter_uri(summary: Summary, label: str) -> str:
    """Return what `lora generate` takes as the adapter."""
    for alias in ("champion", "candidate"):
        if summary[alias] == label:
            return f"models:/{summary['recipe']['registry']['model']}@{alias}"
    return "FOLDER"


def _quoted(text: str) -> str:
    """Return a string as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _training(summary: Summary, label: str) -> str:
    facts = _training_facts(summary, label) | _provenance_facts(summary, label)
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    return "## How it was trained\n\n" + "\n".join(lines)


def _training_facts(summary: Summary, label: str) -> dict[str, str]:
    recipe = summary["recipe"]
    data = summary["data"]
    trained = summary["models"][label]["figures"]
    lora = recipe["lora"]
    batch_size = recipe["training"]["batch_size"]
    processes = recipe["launch"]["processes"]
    source = recipe["data"]["source"]
    method = page_sections.training_method(summary, label)
    time = duration(trained["training_seconds"])
    return {
        "Method": f"{method}, alpha {lora['alpha']:g}, target_modules {lora['target_modules']}",
        "Peak learning rate": f"{words.learning_rate(summary, label):g}",
        "Steps": (
            f"{trained['steps']} of {batch_size} examples, "
            f"{trained['tokens']:,} tokens ({trained['supervised_tokens']:,} supervised)"
        ),
        "Time": f"{time} on {summary['machine']}, {processes} process(es)",
        "Optimizer": trained.get("optimizer", "AdamW"),
        "Data": (
            f"{source}, {data['train_examples']:,} training examples, digest `{data['digest']}`"
        ),
        "Weights' SHA-256": f"`{trained['adapter_sha256']}`",
    }


def _provenance_facts(summary: Summary, label: str) -> dict[str, str]:
    name = summary["recipe"]["name"]
    facts = {}
    for kind, digest in summary["base"]["digests"].items():
        facts[f"Fingerprint of the base, {kind}"] = f"`{digest}`"
    for what, text in page_sections.verified(summary, label):
        facts[f"Verified, {what.rpartition(', ')[2]}"] = text
    versions = []
    for library, version in summary["versions"].items():
        versions.append(f"{library} {version}")
    return facts | {
        "Seed": str(summary["seed"]),
        "Commit": f"`{summary['commit']}`",
        "Versions": ", ".join(versions),
        "Comparison": f"`{summary['key']}`",
        "To repeat it": (
            f"save `{page_sections.RECIPE}` of the MLflow run `{summary['name']}` as "
            f"`{name}.yaml`; then, from a checkout of that commit, `lora run {name}.yaml`"
        ),
    }


def _limits(summary: Summary, label: str) -> str:
    model = summary["models"][label]
    power = model["power"]
    unfinished = model["scores"]["unfinished_answers"]
    limits = [
        "It works only with the base named above; with other weights its answers are meaningless.",
        "The intervals cover the choice of items, but not the training seed: there was one run.",
        "Public benchmarks may be in the base's training data: read differences, not scores.",
    ]
    if power is not None:
        limits.append(
            f"Forgetting was measured on {power['items']:,} questions, which detect a drop of "
            f"{power['smallest_drop']:.3f} or more with 80 % power, and no smaller one."
        )
    if unfinished:
        tokens = summary["recipe"]["evaluation"]["max_new_tokens"]
        limits.append(f"{unfinished} of its answers had not ended after {tokens} tokens.")
    return "## Limits\n\n- " + "\n- ".join(limits)
