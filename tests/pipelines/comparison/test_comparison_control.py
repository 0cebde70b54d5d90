"""Adapters are compared with a control by full fine-tuning or LoRA, a failed control, or none."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from synthetic_models import GOOD, IDLE, ITEMS, SyntheticModel, control_and_adapter

from pipelines.comparison.comparison import ComparisonContext, compare
from pipelines.comparison.document import Comparison
from pipelines.comparison.record_types import ItemRecord
from pipelines.config.recipe import Recipe, parse_recipe

Values = dict[str, Any]
Maker = Callable[..., list[ItemRecord]]
RecipeWith = Callable[..., Values]
Summarize = Callable[..., Comparison]


def test_the_control_is_compared_with_the_base_in_full_precision(summarize: Summarize) -> None:
    control = summarize(rank_2=GOOD).models["control"]
    assert control.change == control.total
    assert control.change.task_gain.mean == pytest.approx(1.0, abs=0.02)
    assert control.judgment is None


def test_an_adapter_that_lost_less_than_the_control_does_not_pass(summarize: Summarize) -> None:
    """A fraction of a loss is positive too: 0.4 nats worse is 80 % of 0.5 nats worse."""
    control = SyntheticModel(4.5, 0.60)
    summary = summarize(control=control, rank_2=SyntheticModel(4.4, 0.57))
    assert summary.models["rank-2"].judgment.verdict.status != "pass"
    assert summary.champion is None


def test_an_adapter_that_gained_is_not_rejected_if_the_control_lost(summarize: Summarize) -> None:
    control = SyntheticModel(4.5, 0.60)
    summary = summarize(control=control, rank_2=SyntheticModel(3.3, 0.57))
    assert summary.models["rank-2"].judgment.verdict.status != "reject"


def test_no_adapter_passes_if_the_control_equals_the_base(
    recipe: Recipe, task_records: Maker, general_records: Maker
) -> None:
    base = task_records([4.0] * ITEMS) + general_records("piqa", [0.6] * ITEMS)
    items = dict.fromkeys(("base", "control", "rank-2"), base)
    summary = compare(recipe, control_and_adapter(), items)
    assert summary.models["rank-2"].judgment.verdict.status != "pass"
    json.dumps(summary.plain(), allow_nan=False)


def test_a_lora_control_is_compared_with_the_base_in_4_bits(
    summarize: Summarize, recipe_with: RecipeWith
) -> None:
    """The control lost nothing of its own base; the adapter lost 0.05 more."""
    under = parse_recipe(recipe_with(control={"method": "lora", "rank": 64}))
    summary = summarize(
        under=under, control=SyntheticModel(3.0, 0.57), rank_2=SyntheticModel(3.2, 0.52)
    )
    control = summary.models["control"]
    adapter = summary.models["rank-2"]
    assert control.change.choice_probability.mean == pytest.approx(0, abs=0.01)
    assert control.total.choice_probability.mean == pytest.approx(-0.03, abs=0.01)
    assert adapter.judgment.beyond_control.mean == pytest.approx(-0.05, abs=0.01)
    assert adapter.judgment.gain_share.mean == pytest.approx(0.8, abs=0.02)
    assert control.judgment is None
    assert summary.control.method == "lora"
    assert summary.frontier[0].method == "lora"
    assert "rank 64" in summary.control.words


def test_without_a_control_an_adapter_must_gain_and_forget_little(
    summarize: Summarize, recipe_with: RecipeWith
) -> None:
    under = parse_recipe(recipe_with(control={"method": "none"}))
    summary = summarize(under=under, control=None, rank_2=GOOD, rank_4=IDLE)
    assert list(summary.models) == ["base", "base-nf4", "rank-2", "rank-4"]
    good = summary.models["rank-2"]
    assert [rule.name for rule in good.judgment.verdict.rules] == [
        "gained on the task",
        "forgot little",
        "all metrics could be computed",
    ]
    assert good.judgment.gain_share is None
    assert good.judgment.beyond_control is None
    assert good.judgment.verdict.status == "pass"
    assert summary.models["rank-4"].judgment.verdict.status != "pass"
    assert summary.champion == "rank-2"
    assert summary.control.words.startswith("There is no control")
    json.dumps(summary.plain(), allow_nan=False)


def test_a_rate_at_which_the_control_diverged_is_null_in_json(
    summarize: Summarize, recipe_with: RecipeWith
) -> None:
    under = parse_recipe(recipe_with(control={"learning_rate": [1e-4, 1e-3]}))
    context = ComparisonContext(rates={1e-4: 2.6, 1e-3: float("inf")})
    summary = summarize(under=under, context=context, rank_2=GOOD)
    stored = Comparison.model_validate_json(summary.model_dump_json())
    assert stored.control.rates == {"0.0001": 2.6, "0.001": None}
