"""The recommended adapter has the lowest rank that gives up little of the best gain."""

from collections.abc import Callable
from math import ceil

import numpy as np
import pytest

from pipelines.comparison.frontier import (
    FrontierPoint,
    FrontierVariant,
    Recommendation,
    frontier_point,
    recommend,
)
from pipelines.comparison.record_types import ItemRecord
from pipelines.comparison.resampling import Array

Records = list[ItemRecord]
Maker = Callable[..., Records]
Recommend = Callable[..., Recommendation | None]
ITEMS = 40


def variant_of(label: str, rank: int, cut_from: int | None = None) -> FrontierVariant:
    return FrontierVariant(label, "lora", rank, 15, 1e-3, cut_from)


def point_of(
    variant: FrontierVariant, items: dict[str, Records], *, trained: bool
) -> FrontierPoint:
    return frontier_point(
        variant,
        items[variant.label],
        full_precision_base=items["base"],
        training_base=items["base"],
        trained=trained,
    )


@pytest.fixture
def recommended(task_records: Maker, general_records: Maker) -> Recommend:
    """Return a function from the loss of each rank and truncated rank to the recommendation."""

    def records(loss: float, noise: float, seed: int) -> Records:
        rng = np.random.default_rng(seed)
        losses = loss + rng.normal(0, noise, ITEMS)
        return task_records(list(losses)) + general_records("piqa", [0.5] * ITEMS)

    def run(
        losses: dict[int, float],
        *,
        noise: float = 0.01,
        passed: tuple[int, ...] | None = None,
        cuts: dict[int, float] | None = None,
    ) -> Recommendation | None:
        highest = max(losses)
        items = {"base": records(4.0, noise, 0)}
        points = []
        for rank, loss in losses.items():
            variant = variant_of(f"rank-{rank}", rank)
            items[variant.label] = records(loss, noise, rank)
            points.append(point_of(variant, items, trained=True))
        for rank, loss in (cuts or {}).items():
            variant = variant_of(f"rank-{highest}→{rank}", rank, highest)
            items[variant.label] = records(loss, noise, 100 + rank)
            points.append(point_of(variant, items, trained=False))
        ranks = losses if passed is None else passed
        return recommend(points, [f"rank-{rank}" for rank in ranks], items)

    return run


@pytest.fixture
def recommended_of_two(task_records: Maker) -> Recommend:
    """Return a function from the gain that rank 4 lacks, by example, to the recommendation.

    Rank 16 gains 1.
    """

    def run(less: Array, difficulty: Array | float = 2.0) -> Recommendation | None:
        best = difficulty + 0 * less
        losses = {"base": best + 1.0, "rank-4": best + less, "rank-16": best}
        items = {label: task_records(list(values)) for label, values in losses.items()}
        variants = [variant_of(f"rank-{rank}", rank) for rank in (4, 16)]
        points = [point_of(variant, items, trained=True) for variant in variants]
        return recommend(points, ["rank-4", "rank-16"], items)

    return run


def test_a_lower_rank_with_the_same_gain_is_recommended(recommended: Recommend) -> None:
    result = recommended({4: 3.0, 16: 2.99, 64: 2.96}, noise=0.1)
    assert result is not None
    assert result.label == "rank-4"
    assert result.reason.startswith(
        "rank-4 has the lowest rank that gives up at most 10% of the task gain of rank-64 (+1.0"
    )
    assert result.gives_up is not None
    assert result.reason.endswith(f" on the same items, at most {ceil(100 * result.gives_up)}%")


def test_gives_up_is_the_upper_end_of_the_interval(recommended_of_two: Recommend) -> None:
    """By hand: the best gains 1.0; the lower rank gains 0.04 or 0.06 less on 40 examples."""
    less = np.array([0.04, 0.06] * (ITEMS // 2))
    result = recommended_of_two(less)
    assert result is not None
    error = 2.0227 * less.std(ddof=1) / np.sqrt(ITEMS)
    assert result.label == "rank-4"
    assert result.gives_up == pytest.approx(0.05 + error, abs=0.1 * error)
    assert "0.050 less (0.047 to 0.053) on the same items, at most 6%" in result.reason


def test_a_wide_interval_does_not_favor_a_lower_rank(recommended_of_two: Recommend) -> None:
    """The lower rank is not significantly worse, but not confirmed to be as good either."""
    result = recommended_of_two(np.array([-0.5, 0.6] * (ITEMS // 2)))
    assert result is not None
    assert result.label == "rank-16"
    assert result.gives_up is None
    assert "no lower rank that passes gives up at most 10%" in result.reason
    assert ": rank-4 0.049 less (-0.1" in result.reason


def test_a_lower_rank_that_gains_less_is_not_recommended(recommended: Recommend) -> None:
    result = recommended({4: 3.2, 16: 3.0, 64: 2.99}, noise=0.02)
    assert result is not None
    assert result.label == "rank-16"


def test_the_best_is_recommended_if_every_lower_rank_gains_less(recommended: Recommend) -> None:
    result = recommended({4: 3.4, 16: 3.2, 64: 3.0})
    assert result is not None
    assert result.label == "rank-64"
    assert result.reason.startswith("rank-64 gains most (+")
    assert "no lower rank that passes gives up at most 10%" in result.reason
    assert ": rank-4 0." in result.reason
    assert "; rank-16 0." in result.reason


def test_the_best_needs_no_comparison_if_it_has_the_lowest_rank(recommended: Recommend) -> None:
    result = recommended({4: 3.0, 16: 3.2})
    assert result is not None
    assert result.label == "rank-4"
    assert "has the lowest rank of them" in result.reason


def test_only_an_adapter_that_passes_is_recommended(recommended: Recommend) -> None:
    result = recommended({4: 3.0, 16: 3.0, 64: 2.9}, passed=(16,))
    assert result == Recommendation("rank-16", "rank-16 is the only one that passes")
    assert recommended({4: 3.0, 16: 3.0}, passed=()) is None


def test_the_comparison_is_paired(recommended_of_two: Recommend) -> None:
    """Examples differ by several nats, the ranks by a fiftieth of the gain on each example.

    Only a paired comparison can confirm such a small difference.
    """
    difficulty = np.random.default_rng(1).uniform(1, 5, ITEMS)
    result = recommended_of_two(np.full(ITEMS, 0.02), difficulty=difficulty)
    assert result is not None
    assert result.label == "rank-4"
    assert result.gives_up == pytest.approx(0.02)


def test_a_truncation_that_keeps_the_gain_is_mentioned_only(recommended: Recommend) -> None:
    result = recommended({16: 3.2, 64: 3.0}, noise=0.02, cuts={32: 3.0, 8: 3.001, 4: 3.5})
    assert result is not None
    assert result.label == "rank-64"
    assert "; rank 64 truncated to 8 would give up at most " in result.reason
    assert result.reason.endswith("with a general change of +0.000, but is not registered")


def test_a_truncation_that_loses_gain_or_is_not_smaller_is_not_mentioned(
    recommended: Recommend,
) -> None:
    result = recommended({4: 3.0, 64: 3.0}, noise=0.02, cuts={8: 3.0, 2: 3.4})
    assert result is not None
    assert result.label == "rank-4"
    assert "truncated to" not in result.reason


def test_a_point_is_compared_with_both_bases(task_records: Maker, general_records: Maker) -> None:
    def records(loss: float, probability: float) -> Records:
        return task_records([loss] * 3) + general_records("piqa", [probability] * 3)

    point = frontier_point(
        variant_of("rank-8→2", 2, 8),
        records(3.5, 0.45),
        full_precision_base=records(4.0, 0.6),
        training_base=records(4.3, 0.5),
        trained=False,
    )
    assert (point.label, point.rank, point.cut_from, point.trained) == ("rank-8→2", 2, 8, False)
    assert point.gain.mean == pytest.approx(0.5)
    assert point.general is not None
    assert point.general.mean == pytest.approx(-0.05)
