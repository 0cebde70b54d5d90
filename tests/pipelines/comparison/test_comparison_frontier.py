"""The summary has the frontier, the recommended adapter, and each change's KL divergence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic_models import BETTER, GOOD, IDLE, SyntheticModel, control_and_adapter

from pipelines.comparison.comparison import ComparisonContext, FrontierVariant, compare
from pipelines.comparison.document import Comparison
from pipelines.comparison.record_types import ChatRecord, ItemRecord
from pipelines.config.recipe import Recipe

Maker = Callable[..., list[ItemRecord]]
Summarize = Callable[..., Comparison]
RIGHT = {"base": 0.5, "base-nf4": 0.6, "control": 0.7, "rank-2": 0.8}
"""Label → probability of the first of two tokens."""


def kl_divergence(before: str, after: str) -> float:
    p = RIGHT[before]
    q = RIGHT[after]
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def test_the_frontier_has_the_compared_models_first(summarize: Summarize, recipe: Recipe) -> None:
    variants = [
        FrontierVariant("rank-4@1", "lora", 4, 1, 1e-3),
        FrontierVariant("control@1", "full", None, 1, 1e-4),
        FrontierVariant("rank-4→1", "lora", 1, 2, 1e-3, 4),
    ]
    also = {
        "rank-4@1": SyntheticModel(3.8, 0.57),
        "control@1": SyntheticModel(3.5, 0.60),
        "rank-4→1": SyntheticModel(3.2, 0.55),
    }
    summary = summarize(also=also, context=ComparisonContext(variants=variants), rank_4=BETTER)
    points = {point.label: point for point in summary.frontier}
    assert list(points) == ["control", "rank-4", "rank-4@1", "control@1", "rank-4→1"]
    assert [point.trained for point in points.values()] == [True, True, False, False, False]
    adapter = summary.models["rank-4"]
    assert points["rank-4"].gain == adapter.total.task_gain
    assert points["rank-4"].general == adapter.change.choice_probability
    settings = ("method", "rank", "step", "learning_rate", "cut_from")
    assert [getattr(points["control"], name) for name in settings] == [
        "full",
        None,
        summary.models["control"].training.result.saved_step,
        recipe.control.learning_rate[0],
        None,
    ]
    assert [getattr(points["rank-4→1"], name) for name in settings] == ["lora", 1, 2, 1e-3, 4]
    assert points["rank-4@1"].general.mean == pytest.approx(0, abs=0.01)
    assert points["control@1"].general.mean == pytest.approx(0, abs=0.01)
    assert points["rank-4→1"].general.mean == pytest.approx(-0.02, abs=0.01)
    reason = summary.recommended.reason
    assert "rank 4 truncated to 1 would give up at most " in reason


def test_a_lower_rank_with_nearly_the_gain_of_the_champion_is_recommended(
    summarize: Summarize,
) -> None:
    summary = summarize(rank_2=SyntheticModel(3.2, 0.57), rank_4=SyntheticModel(3.17, 0.57))
    assert summary.champion == "rank-4"
    assert summary.recommended.label == "rank-2"
    assert 0.02 < summary.recommended.gives_up < 0.1


def test_the_champion_is_recommended_if_lower_ranks_gain_less(summarize: Summarize) -> None:
    summary = summarize(
        rank_2=SyntheticModel(3.4, 0.57),
        rank_4=SyntheticModel(3.36, 0.57),
        rank_8=SyntheticModel(3.2, 0.57),
    )
    assert summary.champion == "rank-8"
    assert summary.recommended.label == "rank-8"


def test_no_adapter_is_recommended_if_none_passes(summarize: Summarize) -> None:
    assert summarize(rank_2=IDLE).recommended is None


def test_without_distributions_there_is_no_divergence(summarize: Summarize) -> None:
    models = summarize(rank_2=GOOD).models
    assert models.pop("base").change is None
    assert all(model.change is not None for model in models.values())
    assert all(model.change.kl is None for model in models.values() if model.change is not None)


def test_each_change_has_the_divergence_from_its_reference(
    recipe: Recipe, task_records: Maker, tmp_path: Path
) -> None:
    for label, right in RIGHT.items():
        rows = np.log([[right, 1 - right]] * 4).astype(np.float16)
        save_file({"log_probabilities": rows}, tmp_path / label)
    chat = ChatRecord(
        id="chat/0", benchmark="chat", prompt_sha256="a", nll=3.0, tokens=4, rows=(0, 4)
    )
    records = [*task_records([3.0, 3.0], [3, 3]), chat]
    context = ComparisonContext(distributions={label: tmp_path / label for label in RIGHT})
    items = dict.fromkeys(RIGHT, records)
    models = compare(recipe, control_and_adapter(), items, context).models

    def expected(before: str, after: str) -> Any:
        return pytest.approx(kl_divergence(before, after), abs=1e-3)

    assert models["base-nf4"].change.kl == expected("base", "base-nf4")
    assert models["control"].change.kl == expected("base", "control")
    assert models["control"].total.kl == models["control"].change.kl
    assert models["rank-2"].change.kl == expected("base-nf4", "rank-2")
    assert models["rank-2"].total.kl == expected("base", "rank-2")
    assert models["rank-2"].change.kl_interval is None  # there is a single chat
