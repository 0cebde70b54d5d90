"""The summary separates quantization, learning and forgetting, and promotes an adapter or none."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from synthetic_models import (
    BASE,
    BETTER,
    CONTROL,
    FORGETFUL,
    GOOD,
    IDLE,
    ITEMS,
    NF4,
    UNCLEAR,
    WITH_ONE_ADAPTER,
    SyntheticModel,
    control_and_adapter,
)

from pipelines.comparison.comparison import compare
from pipelines.comparison.document import Comparison
from pipelines.comparison.record_types import ItemRecord
from pipelines.config.recipe import Recipe

Records = list[ItemRecord]
Maker = Callable[..., Records]
MakeModel = Callable[[SyntheticModel, int], Records]
Summarize = Callable[..., Comparison]


def test_the_adapter_with_the_largest_gain_that_passes_is_champion(summarize: Summarize) -> None:
    summary = summarize(rank_2=GOOD, rank_4=BETTER)
    assert summary.champion == "rank-4"
    assert summary.candidate == "rank-4"
    assert summary.decision.startswith("rank-4 passes and gains most on the task (+0.")


def test_the_candidate_is_the_last_adapter_and_not_always_the_best(summarize: Summarize) -> None:
    summary = summarize(rank_2=BETTER, rank_4=GOOD)
    assert summary.champion == "rank-2"
    assert summary.candidate == "rank-4"


def test_a_forgetful_adapter_is_not_champion_despite_its_gain(summarize: Summarize) -> None:
    summary = summarize(rank_2=GOOD, rank_4=FORGETFUL)
    assert summary.champion == "rank-2"
    assert summary.candidate == "rank-2"
    assert summary.models["rank-4"].judgment.verdict.status == "reject"


def test_without_a_passing_adapter_the_decision_gives_each_reason(summarize: Summarize) -> None:
    summary = summarize(rank_2=IDLE, rank_4=FORGETFUL)
    assert summary.champion is None
    assert summary.candidate is None
    assert summary.recommended is None
    first = summary.models["rank-2"].judgment.verdict.reason
    second = summary.models["rank-4"].judgment.verdict.reason
    assert summary.decision == f"no adapter passes: rank-2: {first}; rank-4: {second}"
    assert "of the control's gain" in first
    assert "general change" in second


def test_an_undecided_adapter_is_candidate_and_not_champion(summarize: Summarize) -> None:
    summary = summarize(rank_2=UNCLEAR)
    assert summary.models["rank-2"].judgment.verdict.status == "can't tell"
    assert summary.champion is None
    assert summary.candidate == "rank-2"
    assert "items (now 80) would decide" in summary.decision


def test_the_cost_of_quantization_is_separate_from_the_gain(summarize: Summarize) -> None:
    models = summarize(rank_2=GOOD).models
    adapter = models["rank-2"]
    assert models["base-nf4"].change.task_gain.mean == pytest.approx(-0.3, abs=0.02)
    assert adapter.change.task_gain.mean == pytest.approx(1.0, abs=0.02)
    assert adapter.total.task_gain.mean == pytest.approx(0.7, abs=0.02)
    assert adapter.judgment.gain_share.mean == pytest.approx(0.7, abs=0.02)
    assert adapter.change.choice_probability.mean == pytest.approx(0, abs=0.01)
    assert adapter.total.choice_probability.mean == pytest.approx(-0.03, abs=0.01)
    assert adapter.judgment.beyond_control.mean == pytest.approx(0, abs=0.01)


def test_without_quantization_training_is_the_total_change(summarize: Summarize) -> None:
    summary = summarize(nf4=None, rank_2=SyntheticModel(3.3, 0.60))
    assert list(summary.models) == ["base", "control", "rank-2"]
    assert summary.models["rank-2"].change == summary.models["rank-2"].total
    assert summary.champion == "rank-2"


def test_models_are_in_the_order_of_the_report(summarize: Summarize) -> None:
    models = summarize(rank_2=GOOD, rank_4=BETTER).models
    assert list(models) == ["base", "base-nf4", "control", "rank-2", "rank-4"]
    assert models["rank-4"].training.key == "key of rank-4"
    assert models["rank-4"].training.result.totals.last_loss == 1.0


def test_the_summary_is_valid_json(summarize: Summarize) -> None:
    summary = summarize(rank_2=GOOD, rank_4=FORGETFUL)
    assert Comparison.model_validate_json(summary.model_dump_json()) == summary


def test_the_gate_uses_the_bounds_of_the_recipe(summarize: Summarize, recipe: Recipe) -> None:
    verdict = summarize(rank_2=GOOD).models["rank-2"].judgment.verdict
    reasons = {rule.name: rule.reason for rule in verdict.rules}
    assert f"at least {recipe.gate.min_gain_share:.0%}" in reasons["learned enough"]
    assert f"at least {-recipe.gate.max_general_drop:+.3f}" in reasons["forgot little"]


def test_a_failed_metric_leaves_the_adapter_undecided(recipe: Recipe, model: MakeModel) -> None:
    items = {}
    for seed, (label, synthetic) in enumerate(WITH_ONE_ADAPTER.items()):
        items[label] = model(synthetic, seed)
    failed = replace(items["rank-2"][-1], errors={"execution": "no such program"})
    items["rank-2"][-1] = failed
    summary = compare(recipe, control_and_adapter(), items)
    adapter = summary.models["rank-2"]
    assert adapter.judgment.verdict.status == "can't tell"
    assert "execution of answer 1: no such program" in summary.decision
    assert adapter.scores.errors == {"execution": 1}
    assert summary.champion is None
    assert summary.candidate == "rank-2"


def test_an_item_that_one_model_cannot_score_is_left_out_for_all(
    recipe: Recipe, model: MakeModel, without: Callable[[Records, str], Records]
) -> None:
    items = {
        "base": model(BASE, 0),
        "base-nf4": model(NF4, 1),
        "control": model(CONTROL, 2),
        "rank-2": without(model(GOOD, 3), "piqa/7"),
    }
    models = compare(recipe, control_and_adapter(), items).models
    for result in models.values():
        assert result.scores.benchmarks["piqa"].left_out == 1
        assert result.scores.benchmarks["piqa"].items == ITEMS - 1


def test_metrics_of_the_recipe_are_listed_if_nothing_was_generated(
    recipe: Recipe, task_records: Maker, general_records: Maker
) -> None:
    records = task_records([4.0, 3.0]) + general_records("piqa", [0.5, 0.6])
    items = dict.fromkeys(("base", "control", "rank-2"), records)
    models = compare(recipe, control_and_adapter(), items).models
    assert models["base"].scores.generation == dict.fromkeys(recipe.evaluation.metrics)


def test_power_reports_what_the_items_can_detect(summarize: Summarize, recipe: Recipe) -> None:
    models = summarize(rank_2=UNCLEAR, rank_4=GOOD).models
    unclear = models["rank-2"].power
    clear = models["rank-4"].power
    assert unclear.items == 2 * ITEMS
    assert unclear.needed > unclear.items
    assert unclear.smallest_drop > recipe.gate.max_general_drop > clear.smallest_drop
    assert unclear.enough is False
    assert clear.enough is True
    assert models["control"].power.items == 2 * ITEMS
    assert models["base-nf4"].power.items == 2 * ITEMS


def test_power_is_also_reported_by_benchmark(summarize: Summarize) -> None:
    """Two benchmarks of the same spread and size: each detects a drop √2 times that of both."""
    power = summarize(rank_2=GOOD).models["rank-2"].power
    assert list(power.benchmarks) == ["piqa", "winogrande"]
    for one in power.benchmarks.values():
        assert one.items == ITEMS
        assert one.enough == (one.needed <= ITEMS)
        assert one.smallest_drop == pytest.approx(2**0.5 * power.smallest_drop, rel=0.25)


def test_the_summary_names_the_metric_of_general_abilities(summarize: Summarize) -> None:
    assert summarize(rank_2=GOOD).general_metric == "choice_probability"
