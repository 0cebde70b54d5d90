"""The summary tells quantisation, learning and forgetting apart, and puts forward the right adapter or none, with a reason."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pipelines.judging.comparison import Trained, compare
from pipelines.recipe import Recipe, parse_recipe

Values = dict[str, Any]
Maker = Callable[..., list[Values]]
ITEMS = 40


@dataclass(frozen=True)
class Figures:
    """One model: its loss per token, its mean probability of the right answer, and how far single items stray."""

    loss: float
    probability: float
    noise: float = 0.01


Summary = Callable[..., Values]
BASE, NF4, CONTROL = Figures(4.0, 0.60), Figures(4.3, 0.57), Figures(3.0, 0.60)
GOOD, BETTER = Figures(3.3, 0.57), Figures(3.2, 0.57)
IDLE = Figures(4.0, 0.57)
FORGETFUL = Figures(3.0, 0.45)
UNCLEAR = Figures(3.2, 0.55, noise=0.25)


@pytest.fixture
def recipe(recipe_with: Callable[..., Values]) -> Recipe:
    return parse_recipe(recipe_with())


@pytest.fixture
def summarise(recipe: Recipe, task_records: Maker, general_records: Maker) -> Summary:
    """Return a function from each model's figures, ranks as rank_2 and rank_4, to the summary."""

    def records(figures: Figures, seed: int) -> list[Values]:
        easy, rng = np.random.default_rng(0), np.random.default_rng(seed)
        losses = figures.loss + easy.uniform(-1, 1, ITEMS) + rng.normal(0, 0.02, ITEMS)
        scored = task_records(list(losses))
        for benchmark in ("piqa", "winogrande"):
            levels = figures.probability + easy.uniform(-0.1, 0.1, ITEMS) + rng.normal(0, figures.noise, ITEMS)
            scored += general_records(benchmark, list(levels.clip(0.01, 0.99)))
        return scored

    def run(*, base: Figures = BASE, nf4: Figures | None = NF4, control: Figures = CONTROL, **adapters: Figures) -> Values:
        models = {"base": base, "base-nf4": nf4, "control": control, **{name.replace("_", "-"): one for name, one in adapters.items()}}
        items = {label: records(one, seed) for seed, (label, one) in enumerate(models.items()) if one is not None}
        ranks = {label: int(label.removeprefix("rank-")) for label in items if label.startswith("rank-")}
        trained = [Trained(label, ranks.get(label), f"key of {label}", f"runs/{label}", {"loss": 1.0}) for label in ("control", *ranks)]
        return compare(recipe, trained, items)

    return run


def test_of_those_that_pass_the_one_that_learnt_most_is_champion(summarise: Summary) -> None:
    summary = summarise(rank_2=GOOD, rank_4=BETTER)
    assert (summary["champion"], summary["candidate"]) == ("rank-4", "rank-4")
    assert summary["decision"].startswith("rank-4 passes and gains most on the task (+0.")


def test_the_candidate_is_the_newest_and_need_not_be_the_best(summarise: Summary) -> None:
    summary = summarise(rank_2=BETTER, rank_4=GOOD)
    assert (summary["champion"], summary["candidate"]) == ("rank-2", "rank-4")


def test_what_forgot_is_no_champion_however_much_it_learnt(summarise: Summary) -> None:
    summary = summarise(rank_2=GOOD, rank_4=FORGETFUL)
    assert (summary["champion"], summary["candidate"]) == ("rank-2", "rank-2")
    assert summary["models"]["rank-4"]["verdict"]["status"] == "reject"


def test_where_none_passes_there_is_no_champion_and_each_reason_is_named(summarise: Summary) -> None:
    summary = summarise(rank_2=IDLE, rank_4=FORGETFUL)
    assert (summary["champion"], summary["candidate"]) == (None, None)
    reasons = [summary["models"][label]["verdict"]["reason"] for label in ("rank-2", "rank-4")]
    assert summary["decision"] == f"no adapter passes: rank-2: {reasons[0]}; rank-4: {reasons[1]}"
    assert "of the control's gain" in reasons[0]
    assert "general change" in reasons[1]


def test_what_cannot_be_told_is_a_candidate_and_no_champion(summarise: Summary) -> None:
    summary = summarise(rank_2=UNCLEAR)
    assert summary["models"]["rank-2"]["verdict"]["status"] == "can't tell"
    assert (summary["champion"], summary["candidate"]) == (None, "rank-2")
    assert "score more items to tell" in summary["decision"]


def test_the_cost_of_quantisation_is_told_apart_from_what_was_learnt(summarise: Summary) -> None:
    models = summarise(rank_2=GOOD)["models"]
    assert models["base-nf4"]["change"]["task_gain"]["mean"] == pytest.approx(-0.3, abs=0.02)
    assert models["rank-2"]["change"]["task_gain"]["mean"] == pytest.approx(1.0, abs=0.02)
    assert models["rank-2"]["total"]["task_gain"]["mean"] == pytest.approx(0.7, abs=0.02)
    assert models["rank-2"]["gain_share"]["mean"] == pytest.approx(0.7, abs=0.02)
    assert models["rank-2"]["change"]["choice_probability"]["mean"] == pytest.approx(0, abs=0.01)
    assert models["rank-2"]["total"]["choice_probability"]["mean"] == pytest.approx(-0.03, abs=0.01)
    assert models["rank-2"]["beyond_control"]["mean"] == pytest.approx(0, abs=0.01)


def test_the_control_is_held_against_the_base_in_full_precision(summarise: Summary) -> None:
    control = summarise(rank_2=GOOD)["models"]["control"]
    assert control["change"] == control["total"]
    assert control["change"]["task_gain"]["mean"] == pytest.approx(1.0, abs=0.02)
    assert "verdict" not in control


def test_a_dense_recipe_has_one_base_and_adapters_change_in_total(summarise: Summary) -> None:
    summary = summarise(nf4=None, rank_2=Figures(3.3, 0.60))
    assert list(summary["models"]) == ["base", "control", "rank-2"]
    assert summary["models"]["rank-2"]["change"] == summary["models"]["rank-2"]["total"]
    assert summary["champion"] == "rank-2"


def test_models_come_in_the_order_of_the_report(summarise: Summary) -> None:
    models = summarise(rank_2=GOOD, rank_4=BETTER)["models"]
    assert list(models) == ["base", "base-nf4", "control", "rank-2", "rank-4"]
    assert models["rank-4"]["key"] == "key of rank-4"
    assert models["rank-4"]["figures"] == {"loss": 1.0}


def test_the_summary_is_plain_json(summarise: Summary) -> None:
    summary = summarise(rank_2=GOOD, rank_4=FORGETFUL)
    assert json.loads(json.dumps(summary, allow_nan=False))["champion"] == "rank-2"


def test_the_gate_is_the_recipe_s(summarise: Summary, recipe: Recipe) -> None:
    rules = {rule["name"]: rule["reason"] for rule in summarise(rank_2=GOOD)["models"]["rank-2"]["verdict"]["rules"]}
    assert f"at least {recipe.gate.min_gain_share:.0%}" in rules["learnt enough"]
    assert f"no less than {-recipe.gate.max_general_drop:+.3f}" in rules["forgot little"]


def test_an_adapter_that_made_the_task_worse_does_not_pass_because_the_control_did_too(summarise: Summary) -> None:
    """A share of a loss is positive as well: 0.4 nats worse is 80 % of 0.5 nats worse."""
    summary = summarise(control=Figures(4.5, 0.60), rank_2=Figures(4.4, 0.57))
    assert summary["models"]["rank-2"]["verdict"]["status"] != "pass"
    assert summary["champion"] is None


def test_an_adapter_that_learnt_is_not_rejected_because_the_control_did_not(summarise: Summary) -> None:
    summary = summarise(control=Figures(4.5, 0.60), rank_2=Figures(3.3, 0.57))
    assert summary["models"]["rank-2"]["verdict"]["status"] != "reject"


def test_a_control_that_is_the_base_gives_no_share_that_passes(recipe: Recipe, task_records: Maker, general_records: Maker) -> None:
    base = task_records([4.0] * ITEMS) + general_records("piqa", [0.6] * ITEMS)
    items = {"base": base, "control": base, "rank-2": base}
    trained = [Trained("control", None, "a", "a", {}), Trained("rank-2", 2, "b", "b", {})]
    summary = compare(recipe, trained, items)
    assert summary["models"]["rank-2"]["verdict"]["status"] != "pass"
    json.dumps(summary, allow_nan=False)
