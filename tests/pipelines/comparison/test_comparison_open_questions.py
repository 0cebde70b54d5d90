"""Benchmarks of open questions are judged one by one, each in its own scale."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from synthetic_models import GOOD, ITEMS, WITH_ONE_ADAPTER, SyntheticModel, control_and_adapter

from pipelines.comparison.comparison import compare
from pipelines.comparison.document import ModelSummary
from pipelines.comparison.power import power_of
from pipelines.comparison.record_types import ItemRecord
from pipelines.config.recipe import Recipe

Records = list[ItemRecord]
Maker = Callable[..., Records]
MakeModel = Callable[[SyntheticModel, int], Records]


def statuses(model: ModelSummary) -> dict[str, str]:
    """Return rule → status."""
    return {rule.name: rule.status for rule in model.judgment.verdict.rules}


@pytest.fixture
def open_records(probe_records: Maker, score_records: Maker) -> Maker:
    """Return a factory of open questions, from the fraction of right answers and the perplexity."""

    def make(right: float, perplexity: float) -> Records:
        probes = probe_records("capitals", [index < 20 * right for index in range(20)])
        perplexities = [perplexity, 1.1 * perplexity] * 10
        return probes + score_records("perplexity", perplexities, higher_is_better=False)

    return make


@pytest.mark.parametrize(
    ("right", "perplexity", "status"),
    [(1.0, 1.0, "pass"), (0.0, 1.0, "reject"), (1.0, 1.5, "reject"), (0.5, 1.0, "reject")],
)
def test_worse_open_answers_reject_although_the_choices_did_not_change(
    recipe: Recipe,
    model: MakeModel,
    open_records: Maker,
    right: float,
    perplexity: float,
    status: str,
) -> None:
    """The reference is the adapter's base: perplexity may rise by 3 % of its 12."""
    items = {}
    for seed, (label, synthetic) in enumerate(WITH_ONE_ADAPTER.items()):
        base_perplexity = 10.0 if label == "base" else 12.0
        items[label] = model(synthetic, seed) + open_records(1.0, base_perplexity)
    items["rank-2"] = model(GOOD, 3) + open_records(right, 12.0 * perplexity)
    adapter = compare(recipe, control_and_adapter(), items).models["rank-2"]
    rules = statuses(adapter)
    assert rules["forgot little"] == "pass"
    assert rules["forgot little more than the control"] == "pass"
    assert rules["forgot little of capitals"] == ("pass" if right == 1.0 else "reject")
    assert rules["forgot little of perplexity"] == ("pass" if perplexity == 1.0 else "reject")
    assert adapter.judgment.verdict.status == status
    assert list(adapter.power.benchmarks) == ["piqa", "winogrande", "capitals", "perplexity"]
    json.dumps(adapter.plain(), allow_nan=False)


def test_a_drop_of_a_score_is_a_fraction_of_the_base_score(
    recipe: Recipe, model: MakeModel, score_records: Maker
) -> None:
    rng = np.random.default_rng(1)
    scores = {"base-nf4": rng.uniform(5, 15, 30), "rank-2": rng.uniform(4, 14, 30)}
    items = {}
    for seed, (label, synthetic) in enumerate(WITH_ONE_ADAPTER.items()):
        values = scores.get(label, np.full(30, 10.0))
        items[label] = model(synthetic, seed) + score_records("task", list(values))
    adapter = compare(recipe, control_and_adapter(), items).models["rank-2"]
    scale = scores["base-nf4"].mean()
    drop = recipe.gate.max_general_drop * scale
    differences = scores["rank-2"] - scores["base-nf4"]
    assert adapter.power.benchmarks["task"] == power_of([differences], drop)
    reasons = {rule.name: rule.reason for rule in adapter.judgment.verdict.rules}
    expected = f"at least {-drop:+.3f}, 3% of the base's {scale:.3f}"
    assert expected in reasons["forgot little of task"]


def test_a_single_benchmark_of_open_questions_is_judged_once(
    recipe: Recipe, task_records: Maker, probe_records: Maker
) -> None:
    items = {}
    for label, loss in (("base", 4.0), ("control", 3.0), ("rank-2", 3.1)):
        items[label] = task_records([loss] * ITEMS) + probe_records("capitals", [True] * 8)
    adapter = compare(recipe, control_and_adapter(), items).models["rank-2"]
    assert list(statuses(adapter)) == [
        "learned enough",
        "forgot little",
        "forgot little more than the control",
    ]


def test_tasks_with_their_own_score_are_judged_one_by_one(
    recipe: Recipe, task_records: Maker, score_records: Maker
) -> None:
    def records(loss: float, f1: float) -> Records:
        return (
            task_records([loss] * ITEMS)
            + score_records("f1", [f1] * 8)
            + score_records("steps", [9.0] * 8, higher_is_better=False)
        )

    items = {"base": records(4.0, 0.9), "control": records(3.0, 0.9), "rank-2": records(3.1, 0.4)}
    summary = compare(recipe, control_and_adapter(), items)
    adapter = summary.models["rank-2"]
    assert statuses(adapter) == {
        "learned enough": "pass",
        "forgot little of f1": "reject",
        "forgot little of steps": "pass",
    }
    assert adapter.power.needed is None
    assert adapter.power.enough is None
    assert adapter.power.benchmarks["f1"].enough is True
    assert summary.frontier[1].general.mean == pytest.approx(-0.25)
    json.dumps(summary.plain(), allow_nan=False)
