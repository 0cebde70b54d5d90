"""Small lm-eval tasks over six documents, one of each output type."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.config.sections import LmEvalSection

Values = dict[str, Any]
WORDS = ("red", "north", "south", "east", "west", "left")
DOCS: list[Values] = [
    {
        "question": f"Say {word} {index}.",
        "right": index % 3,
        "answers": [word, "green", f"{word} blue up"],
        "text": f"{word} look on",
    }
    for index, word in enumerate(WORDS)
]
COMMON: Values = {
    "dataset_path": "json",
    "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
}
ACCURACY: Values = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, Values] = {
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "metric_list": [ACCURACY],
    },
    "shown": {
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "doc_to_text": "{{question}} ",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [ACCURACY],
    },
    "continued": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{text}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ACCURACY,
        ],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{text}} {{question}} {{text}}",
        "metric_list": [
            {
                "metric": "word_perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            },
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
    },
}


def write_docs(file: Path, docs: Sequence[Values] = DOCS) -> None:
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))


def write_task(folder: Path, name: str, task: Values) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **COMMON, **task}))


def without(task: str, field: str) -> Values:
    """Return a task that lacks a field."""
    return {name: value for name, value in TASKS[task].items() if name != field}


def changed_docs(index: int, **changes: Any) -> list[Values]:
    """Return the documents with one that is changed; None removes a field from it."""
    docs = [dict(doc) for doc in DOCS]
    for name, value in changes.items():
        docs[index][name] = value
        if value is None:
            del docs[index][name]
    return docs


def settings(*names: str, limit: int | None = None) -> LmEvalSection:
    """Return the section of a recipe."""
    return LmEvalSection(tasks=names, include_path=".", limit=limit)
