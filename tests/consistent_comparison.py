"""A comparison whose metrics follow from its item records, as a run writes it, in miniature."""

from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from registered import write_adapter, write_training
from summaries import Summary, build
from summary_parts import DIGEST, recipe

from pipelines.comparison.comparison import ComparedChampion, ComparedModel, ComparisonContext
from pipelines.comparison.comparison import compare as compare_models
from pipelines.comparison.record_files import write_items
from pipelines.comparison.record_types import (
    ChoiceRecord,
    GenerationRecord,
    ItemRecord,
    PassageRecord,
    TaskRecord,
)
from pipelines.config.recipe import parse_recipe
from pipelines.runtime.interfaces.results import TrainResult

ITEMS = 12
CHAMPION = "champion-1"
LOSSES = {
    "base": 4.0,
    "control": 3.0,
    "rank-16": 3.2,
    CHAMPION: 3.6,
}
"""Label → mean loss per token."""


def consistent(folder: Path, name: str) -> Summary:
    """Return the plain summary of a comparison in which rank 16 passes and beats a champion.

    Args:
        folder: gets item records, and folders as training leaves them.
        name: of the registered model.
    """
    summary = build(folder)
    values = recipe([16])
    values["base_model"]["quantization"] = "none"
    values["registry"]["model"] = name
    values["evaluation"]["metrics"] = ["chrf"]
    values["frontier"] |= {"cuts": []}
    items = {label: records(label) for label in LOSSES}
    trained = []
    for label in ("control", "rank-16"):
        trained.append(_trained(folder / label, label, summary["models"][label]["training"]))
    context = ComparisonContext(
        rates={1e-4: 2.91, 3e-4: 3.02}, champion=ComparedChampion("1", "ee" * 32)
    )
    comparison = compare_models(parse_recipe(values), trained, items, context)
    paths = {}
    for label, one in items.items():
        paths[label] = str(folder / f"{label}.jsonl")
        write_items(Path(paths[label]), one)
    return summary | comparison.plain() | {"recipe": values, "items": paths}


def records(label: str) -> list[ItemRecord]:
    """Return the records of one model: examples, questions, passages and answers."""
    shared = np.random.default_rng(0)
    own = np.random.default_rng(sum(map(ord, label)))
    found: list[ItemRecord] = []
    for index in range(ITEMS):
        nll = 10 * (LOSSES[label] + shared.uniform(-1, 1) + own.normal(0, 0.02))
        found.append(TaskRecord(id=index, prompt_sha256=DIGEST, nll=nll, tokens=10))
    for benchmark in ("piqa", "winogrande"):
        for index in range(ITEMS):
            right = 0.6 + shared.uniform(-0.1, 0.1) + own.normal(0, 0.005)
            found.append(_choice(benchmark, index, right))
    for index in range(ITEMS):
        nll = 20 * (0.8 + shared.uniform(-0.1, 0.1) + own.normal(0, 0.01))
        passage = PassageRecord(
            id=f"text/{index}",
            benchmark="passages",
            prompt_sha256=DIGEST,
            nll=nll,
            tokens=5,
            bytes=20,
        )
        found.append(passage)
    if label != CHAMPION:
        found += [_answer(index, 40 + own.uniform(0, 10)) for index in range(3)]
    return found


def _choice(benchmark: str, index: int, right: float) -> ChoiceRecord:
    return ChoiceRecord(
        id=f"{benchmark}/{index}",
        benchmark=benchmark,
        prompt_sha256=DIGEST,
        gold=0,
        log_likelihoods=(log(right), log(1 - right)),
        bytes=(4, 4),
        greedy=(False, False),
    )


def _answer(index: int, chrf: float) -> GenerationRecord:
    return GenerationRecord(
        id=index,
        benchmark="answers",
        prompt_sha256=DIGEST,
        prompt=f"question {index}",
        reference="the cat sat on the mat",
        answer="the cat sat",
        metrics={"chrf": chrf},
        errors={},
        ended=True,
    )


def _trained(folder: Path, label: str, values: Mapping[str, Any]) -> ComparedModel:
    """Return a trained model, with the folder that training leaves."""
    write_training(folder)
    result = TrainResult.model_validate(values["result"])
    rank = values["rank"]
    if rank is not None:
        sha256 = write_adapter(folder / "adapter", label)
        saved = result.saved.model_copy(update={"adapter_sha256": sha256})
        result = result.model_copy(update={"saved": saved})
    return ComparedModel(label, rank, f"key of {label}", str(folder), result)
