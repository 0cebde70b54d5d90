"""A halving orders experiments by loss, and compares each with the best one by example."""

import pytest

from pipelines.comparison.grid import AdapterSettings, GridSearch, halve
from pipelines.runtime.interfaces.results import TuneResult

SETTINGS = AdapterSettings(rank=2, learning_rate=0.1, target_modules="all-linear")


def tuned(*losses: float) -> TuneResult:
    """Return the losses of examples with two supervised tokens each."""
    tokens = (2,) * len(losses)
    return TuneResult(tuning_loss=sum(losses) / sum(tokens), losses=losses, tokens=tokens)


def test_the_better_half_continues_and_the_distance_has_an_interval() -> None:
    results = {"a": tuned(4, 6, 8), "b": tuned(2, 4, 6), "c": tuned(3, 5, 7), "d": None}
    rung = halve(4, results, 2)
    assert [trial.label for trial in rung.trials] == ["b", "c", "a", "d"]
    assert rung.continuing == ("b", "c")
    best, second, third, diverged = rung.trials
    assert best.behind is None and best.tuning_loss == 2
    assert second.behind is not None and second.behind.mean == pytest.approx(0.5)
    assert third.behind is not None and third.behind.low == pytest.approx(1)
    assert diverged.tuning_loss is None and diverged.behind is None and not diverged.continues


def test_of_equal_losses_the_first_continues() -> None:
    assert halve(1, {"x": tuned(1, 2), "y": tuned(1, 2)}, 1).continuing == ("x",)


def test_diverged_experiments_do_not_continue_even_if_places_are_left() -> None:
    infinite = tuned(float("inf"), 1)
    results = {"a": None, "b": tuned(1, 2), "c": tuned(float("nan"), 1), "d": infinite}
    rung = halve(1, results, 4)
    assert rung.continuing == ("b",)
    assert [trial.tuning_loss for trial in rung.trials[1:]] == [None, None, None]
    assert [trial.behind for trial in rung.trials] == [None] * 4


def test_a_search_counts_its_steps() -> None:
    labels = "abcd"
    first = halve(2, {label: tuned(place, 1) for place, label in enumerate(labels)}, 2)
    second = halve(4, {"a": tuned(1, 1), "b": tuned(0, 1)}, 1)
    search = GridSearch(experiments=dict.fromkeys(labels, SETTINGS), steps=8, rungs=(first, second))
    assert search.survivors == ("b",)
    assert search.steps_taken == 4 * 2 + 2 * 2 + 4
    assert search.exhaustive_steps == 32
