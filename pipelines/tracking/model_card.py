"""The model card of one adapter: README.md in the form of the Hugging Face hub, which stands beside its files.

The front matter is what the hub reads (huggingface.co/docs/hub/model-cards): base, library, data, results. The hub knows
only models and data sets of its own, so a base or a source from elsewhere is named in the text alone.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from pipelines.comparison.comparison import BASE, CONTROL
from pipelines.reporting import page_sections, words
from pipelines.reporting.figures import Figure, figures
from pipelines.reporting.formats import duration, interval_text, short_count

Summary = Mapping[str, Any]
FILE = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
KINDS = {
    "bleu": "bleu",
    "chrf": "chrf",
    "rouge_l": "rouge",
    "exact_match": "exact_match",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
}
"""Names that the hub has for our metrics; another keeps ours."""


def card(summary: Summary, label: str) -> str:
    """Return the text of the card.

    Args:
        summary: see `pipelines.comparison.comparison`, with `base` and `data` beside it.
        label: one of the adapters.
    """
    front = yaml.safe_dump(_front_matter(summary, label), sort_keys=False, allow_unicode=True)
    parts = (_what_it_is, _verdict, _figures, _use, _training, _limits)
    return "---\n" + front + "---\n\n" + "\n\n".join(part(summary, label) for part in parts) + "\n"


def _front_matter(summary: Summary, label: str) -> dict[str, Any]:
    recipe = summary["recipe"]
    front: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if HUB_ID.fullmatch(summary["base"]["id"]):
        front |= {"base_model": summary["base"]["id"], "base_model_relation": "adapter"}
    if HUB_ID.fullmatch(recipe["data"]["source"]):
        front["datasets"] = [recipe["data"]["source"]]
    quantized = recipe["base_model"]["quantization"] == "nf4"
    front["tags"] = [
        "lora",
        *(["qlora"] if quantized else []),
        *(["dora"] if recipe["lora"]["use_dora"] else []),
        "peft",
    ]
    front["model-index"] = [
        {"name": f"{recipe['registry']['model']}-{label}", "results": _results(summary, label)}
    ]
    return front


def _results(summary: Summary, label: str) -> list[dict[str, Any]]:
    """Return what was measured on the task and on each benchmark, as the hub lists results."""
    scores, source = summary["models"][label]["scores"], summary["recipe"]["data"]["source"]
    task = {"perplexity": scores["perplexity"], **scores["generation"]}
    own = {
        "type": source if HUB_ID.fullmatch(source) else "held-out",
        "name": f"{source}, held-out examples",
    }
    asked = {
        name: {"accuracy": one["accuracy"], "choice_probability": one["choice_probability"]}
        for name, one in scores["benchmarks"].items()
    }
    listed = [
        (own, task),
        *(({"type": name, "name": name}, found) for name, found in asked.items()),
    ]
    return [
        {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
        for dataset, found in listed
        if (metrics := [_metric(name, value) for name, value in found.items() if value is not None])
    ]


def _metric(name: str, value: float) -> dict[str, Any]:
    return {"type": KINDS.get(name, name), "name": name, "value": round(float(value), 4)}


def _what_it_is(summary: Summary, label: str) -> str:
    recipe, base = summary["recipe"], summary["base"]
    revision = f" at revision `{base['revision']}`" if base["revision"] else ""
    over = (
        "stored in 4 bits (NF4)"
        if recipe["base_model"]["quantization"] == "nf4"
        else "in full precision"
    )
    method = page_sections.training_method(summary, label).partition(" over ")[0]
    weights = short_count(summary["models"][label]["figures"]["trained_weights"])
    return (
        f"# {recipe['registry']['model']}, {label}\n\n"
        f"An adapter ({method}) for `{base['id']}`{revision}, trained over that base {over} on {recipe['data']['source']}. "
        f"It holds {weights} weights and needs the base."
    )


def _verdict(summary: Summary, label: str) -> str:
    verdict = summary["models"][label]["verdict"]
    role = "It was put forward as champion. " if label == summary["champion"] else ""
    rules = [
        f"- {rule['name']}: **{rule['status']}** – {rule['reason']}" for rule in verdict["rules"]
    ] or [verdict["reason"]]
    return "\n".join(
        [f"## Verdict: {verdict['status']}\n", f"{role}{summary['control']['words']}\n", *rules]
    )


def _figures(summary: Summary, label: str) -> str:
    models = summary["models"]
    lines = [_row(figure, models, label) for figure in figures(models)]
    columns = [
        "Figure",
        "Base",
        *([CONTROL.capitalize()] if CONTROL in models else []),
        "This adapter",
        "Change by training (95 %)",
        "In all (95 %)",
    ]
    return "\n".join(
        [
            "## What it learnt and what it forgot\n",
            "A change is positive where the model became better: by training, against the base it was trained over; in all, against",
            "the base in full precision.\n",
            "| " + " | ".join(columns) + " |",
            "| --- |" + " ---: |" * (len(columns) - 1),
            *lines,
        ]
    )


def _row(figure: Figure, models: Mapping[str, Any], label: str) -> str:
    levels = [figure.level(models[name]) for name in (BASE, CONTROL, label) if name in models]
    changes = [figure.change(models[label], effect) for effect in ("change", "total")]
    shown = ["–" if level is None else figure.show(level) for level in levels]
    shown += ["–" if change is None else interval_text(change) for change in changes]
    unit = f" ({figure.unit})" if figure.unit else ""
    title = figure.title.replace("|", "\\|")  # a task of one's own may bear any name
    return f"| {title}{unit} | " + " | ".join(shown) + " |"


def _use(summary: Summary, label: str) -> str:
    recipe, base = summary["recipe"], summary["base"]
    quantized = recipe["base_model"]["quantization"] == "nf4"
    alias = next((alias for alias in ("champion", "candidate") if summary[alias] == label), None)
    named = f"models:/{recipe['registry']['model']}@{alias}" if alias else "FOLDER"
    there = HUB_ID.fullmatch(base["id"]) or (
        base["id"].startswith("/") and not base["id"].endswith(".gguf")
    )
    options = [f", revision={_quoted(base['revision'])}"] if base["revision"] else []
    options += [", quantization_config=in_4_bits"] if quantized else []
    config = 'in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
    lines = [
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' if quantized else ''}",
        "",
        *([config] if quantized else []),
        f"base = AutoModelForCausalLM.from_pretrained({_quoted(base['id'] if there else 'BASE')}{''.join(options)})"
        + ("" if there else f"  # a folder with {base['id']}"),
        'model = PeftModel.from_pretrained(base, "FOLDER")  # the folder of this file',
    ]
    shell = f'```sh\nlora generate --adapter {named} "…"\n```'
    checked = "`lora generate` finds the base by itself and refuses one of other weights:"
    return "## How to use it\n\n```python\n" + "\n".join(lines) + f"\n```\n\n{checked}\n\n{shell}"


def _quoted(text: str) -> str:
    """Return a string as Python writes it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _training(summary: Summary, label: str) -> str:
    recipe, data, trained = summary["recipe"], summary["data"], summary["models"][label]["figures"]
    lora, method = recipe["lora"], page_sections.training_method(summary, label)
    facts = {
        "Method": f"{method}, alpha {lora['alpha']:g}, target_modules {lora['target_modules']}",
        "Peak learning rate": f"{words.learning_rate(summary, label):g}",
        "Steps": f"{trained['steps']} of {recipe['training']['batch_size']} examples, {trained['tokens']:,} tokens "
        f"({trained['supervised_tokens']:,} supervised)",
        "Time": f"{duration(trained['training_seconds'])} on {summary['machine']}, {recipe['launch']['processes']} process(es)",
        "Optimiser": trained.get("optimizer", "AdamW"),
        "Data": f"{recipe['data']['source']}, {data['train_examples']:,} training examples, digest `{data['digest']}`",
        "Weights' SHA-256": f"`{trained['adapter_sha256']}`",
        **{
            f"Fingerprint of the base, {kind}": f"`{value}`"
            for kind, value in summary["base"]["digests"].items()
        },
        **{
            f"Verified, {what.rpartition(', ')[2]}": text
            for what, text in page_sections.verified(summary, label)
        },
        "Seed": str(summary["seed"]),
        "Commit": f"`{summary['commit']}`",
        "Versions": ", ".join(
            f"{library} {version}" for library, version in summary["versions"].items()
        ),
        "Comparison": f"`{summary['key']}`",
        "To repeat it": f"save `{page_sections.RECIPE}` of the MLflow run `{summary['name']}` as `{recipe['name']}.yaml`; then, from a "
        f"checkout of that commit, `lora run {recipe['name']}.yaml`",
    }
    return "## How it was trained\n\n" + "\n".join(
        f"- {name}: {value}" for name, value in facts.items()
    )


def _limits(summary: Summary, label: str) -> str:
    scores, power = summary["models"][label]["scores"], summary["models"][label]["power"]
    limits = [
        "It belongs to the very base that is named above; over other weights its answers mean nothing.",
        "The intervals cover the choice of items. They do not cover the training seed: one run was made.",
        "Public benchmarks may be among what the base was trained on: read differences, not scores.",
    ]
    if power is not None:
        seen = f"show a drop of {power['smallest_drop']:.3f} or more with 80 % power, and no smaller one"
        limits.append(f"Forgetting was asked of {power['items']:,} questions, which {seen}.")
    if scores["unfinished_answers"]:
        limits.append(
            f"{scores['unfinished_answers']} of its answers had not ended after {summary['recipe']['evaluation']['max_new_tokens']} tokens."
        )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)
