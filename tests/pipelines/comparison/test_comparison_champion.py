"""An adapter must beat the registered champion, unless it is the champion itself."""

from collections.abc import Callable
from typing import Any

from synthetic_models import BETTER, GOOD, SyntheticModel

from pipelines.comparison.comparison import ComparedChampion, ComparisonContext
from pipelines.comparison.document import Comparison
from pipelines.config.recipe import parse_recipe

Values = dict[str, Any]
Summarize = Callable[..., Comparison]
OTHER = ComparedChampion("3", "digest of another")


def verdicts(summary: Values) -> dict[str, Values]:
    """Return label → verdict of each adapter."""
    models = summary.models
    return {
        label: model.judgment.verdict
        for label, model in models.items()
        if model.judgment is not None
    }


def test_an_adapter_that_does_not_beat_the_champion_is_not_promoted(summarize: Summarize) -> None:
    summary = summarize(
        also={"champion-3": SyntheticModel(3.25, 0.57)},
        context=ComparisonContext(champion=OTHER),
        rank_2=GOOD,
        rank_4=BETTER,
    )
    rejected = verdicts(summary)["rank-2"]
    assert rejected.status == "reject"
    assert "-0.05" in rejected.reason
    assert "over the registered champion" in rejected.reason
    assert summary.champion == "rank-4"
    assert summary.recommended.label == "rank-4"
    champion = summary.registered_champion
    assert champion.version == "3"
    assert champion.adapter_sha256 == "digest of another"
    assert champion.label == "champion-3"
    assert champion.words.startswith("The registered champion, version 3, gains +0.75")
    assert "champion-3" not in summary.models
    assert [point.label for point in summary.frontier] == ["control", "rank-2", "rank-4"]


def test_a_repeated_run_has_the_same_verdicts_after_its_promotion(summarize: Summarize) -> None:
    """Version 3 is rank-4 of the same run; rank-2, which learned less, passes again."""
    first = summarize(rank_2=GOOD, rank_4=BETTER)
    champion = ComparedChampion("3", "digest of rank-4")
    again = summarize(context=ComparisonContext(champion=champion), rank_2=GOOD, rank_4=BETTER)
    assert first.champion == "rank-4"
    assert verdicts(again) == verdicts(first)
    assert verdicts(again)["rank-2"].status == "pass"
    assert again.model_copy(update={"registered_champion": None}) == first
    assert again.registered_champion.words == (
        "The registered champion, version 3, is identical to rank-4 of this run "
        "and need not be beaten."
    )


def test_a_champion_that_cannot_be_compared_leaves_all_undecided(summarize: Summarize) -> None:
    objection = "it was trained on another base"
    champion = ComparedChampion("3", "digest of another", objection)
    summary = summarize(context=ComparisonContext(champion=champion), rank_2=GOOD, rank_4=BETTER)
    for label in ("rank-2", "rank-4"):
        verdict = verdicts(summary)[label]
        assert verdict.status == "can't tell"
        assert objection in verdict.reason


def test_a_gate_without_a_bound_for_the_champion_does_not_compare_it(
    summarize: Summarize, recipe_with: Callable[..., Values]
) -> None:
    summary = summarize(
        under=parse_recipe(recipe_with(gate={"min_gain_over_champion": None})),
        also={"champion-3": SyntheticModel(2.0, 0.57)},
        context=ComparisonContext(champion=OTHER),
        rank_2=GOOD,
    )
    assert verdicts(summary)["rank-2"].status == "pass"
