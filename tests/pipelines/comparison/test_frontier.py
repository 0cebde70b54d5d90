"""Of the adapters that pass, the lowest rank that learnt as much is recommended, and the reason is in the numbers."""

from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np
import pytest

from pipelines.comparison.frontier import Point, Recommendation, Variant, place, recommend
from pipelines.comparison.resampling import Array

Values = dict[str, Any]
Records = list[Values]
Maker = Callable[..., Records]
Recommend = Callable[..., Recommendation | None]
ITEMS = 40


@pytest.fixture
def recommended(task_records: Maker, general_records: Maker) -> Recommend:
    """Return a function from each rank's loss and noise, and each cut's, to the recommendation."""

    def records(loss: float, noise: float, seed: int) -> Records:
        rng = np.random.default_rng(seed)
        return task_records(list(loss + rng.normal(0, noise, ITEMS))) + general_records(
            "piqa", [0.5] * ITEMS
        )

    def run(
        losses: dict[int, float],
        *,
        noise: float = 0.01,
        passed: tuple[int, ...] | None = None,
        cuts: dict[int, float] = {},  # noqa: B006
    ) -> Any:
        highest, variants = max(losses), []
        items = {"base": records(4.0, noise, 0)}
        for rank, loss in losses.items():
            items[f"rank-{rank}"] = records(loss, noise, rank)
            variants.append((Variant(f"rank-{rank}", "lora", rank, 15, 1e-3), True))
        for rank, loss in cuts.items():
            items[f"rank-{highest}→{rank}"] = records(loss, noise, 100 + rank)
            variants.append(
                (Variant(f"rank-{highest}→{rank}", "lora", rank, 15, 1e-3, highest), False)
            )
        bases = (items["base"], items["base"])
        points = [
            place(variant, bases, items[variant.label], trained=trained)
            for variant, trained in variants
        ]
        return recommend(
            points, [f"rank-{rank}" for rank in (losses if passed is None else passed)], items
        )

    return run


@pytest.fixture
def behind(task_records: Maker) -> Recommend:
    """Return a function from how much less rank 4 gains than rank 16 on each example to the recommendation; rank 16 gains 1."""

    def run(less: Array, easy: Array | float = 2.0) -> Any:
        losses = {"base": easy + 1.0 + 0 * less, "rank-4": easy + less, "rank-16": easy + 0 * less}
        items = {label: task_records(list(values)) for label, values in losses.items()}
        variants = [Variant(f"rank-{rank}", "lora", rank, 15, 1e-3) for rank in (4, 16)]
        points = [
            place(variant, (items["base"], items["base"]), items[variant.label], trained=True)
            for variant in variants
        ]
        return recommend(points, ["rank-4", "rank-16"], items)

    return run


def test_a_lower_rank_that_learnt_as_much_is_recommended(recommended: Recommend) -> None:
    found = recommended({4: 3.0, 16: 2.99, 64: 2.96}, noise=0.1)
    assert found is not None
    assert found.label == "rank-4"
    assert found.reason.startswith(
        "rank-4 has the lowest rank that surely gives up no more than 10% of the task gain of rank-64 (+1.0"
    )
    assert found.reason.endswith(f" on the same items, at most {ceil(100 * found.gives_up)}%")


def test_what_it_gives_up_is_the_upper_end_of_what_it_gains_less(behind: Recommend) -> None:
    """By hand: the best gains 1.0, and the lower rank 0.04 or 0.06 less on each of forty examples."""
    less = np.array([0.04, 0.06] * (ITEMS // 2))
    found = behind(less)
    assert found is not None
    error = 2.0227 * less.std(ddof=1) / np.sqrt(ITEMS)
    assert (found.label, found.gives_up) == ("rank-4", pytest.approx(0.05 + error, abs=0.1 * error))
    assert "0.050 less (0.047 to 0.053) on the same items, at most 6%" in found.reason


def test_few_examples_that_show_nothing_do_not_speak_for_a_lower_rank(behind: Recommend) -> None:
    """Where the interval is so wide that nothing is sure, the lower rank is not surely worse, and neither surely as good."""
    found = behind(np.array([-0.5, 0.6] * (ITEMS // 2)))
    assert found is not None
    assert (found.label, found.gives_up) == ("rank-16", None)
    assert (
        "no lower rank that passes surely gives up at most 10%: rank-4 0.049 less (-0.1"
        in found.reason
    )


def test_a_lower_rank_that_surely_learnt_less_is_not(recommended: Recommend) -> None:
    found = recommended({4: 3.2, 16: 3.0, 64: 2.99}, noise=0.02)
    assert found is not None
    assert found.label == "rank-16"


def test_where_every_lower_rank_learnt_less_the_best_is_recommended_and_says_so(
    recommended: Recommend,
) -> None:
    found = recommended({4: 3.4, 16: 3.2, 64: 3.0})
    assert found is not None
    assert found.label == "rank-64"
    assert found.reason.startswith("rank-64 gains most (+")
    assert all(
        part in found.reason
        for part in (
            "no lower rank that passes surely gives up at most 10%",
            ": rank-4 0.",
            "; rank-16 0.",
        )
    )


def test_a_best_that_has_the_lowest_rank_needs_no_comparison(recommended: Recommend) -> None:
    found = recommended({4: 3.0, 16: 3.2})
    assert found is not None
    assert (found.label, "has the lowest rank of them" in found.reason) == ("rank-4", True)


def test_only_what_passes_is_recommended(recommended: Recommend) -> None:
    found = recommended({4: 3.0, 16: 3.0, 64: 2.9}, passed=(16,))
    assert found == Recommendation("rank-16", "rank-16 is the only one that passes")
    assert recommended({4: 3.0, 16: 3.0}, passed=()) is None


def test_the_comparison_is_paired(behind: Recommend) -> None:
    """Examples differ by some nats and the two ranks by a fiftieth of the gain on each: only paired, that is surely little."""
    found = behind(np.full(ITEMS, 0.02), easy=np.random.default_rng(1).uniform(1, 5, ITEMS))
    assert found is not None
    assert (found.label, found.gives_up) == ("rank-4", pytest.approx(0.02))


def test_a_cut_that_keeps_the_gain_is_named_and_not_recommended(recommended: Recommend) -> None:
    found = recommended({16: 3.2, 64: 3.0}, noise=0.02, cuts={32: 3.0, 8: 3.001, 4: 3.5})
    assert found is not None
    assert found.label == "rank-64"
    assert "; rank 64 cut to 8 would give up at most " in found.reason
    assert found.reason.endswith("with a general change of +0.000, but is not registered")


def test_a_cut_that_loses_the_gain_or_is_no_smaller_is_not_named(recommended: Recommend) -> None:
    found = recommended({4: 3.0, 64: 3.0}, noise=0.02, cuts={8: 3.0, 2: 3.4})
    assert found is not None
    assert (found.label, "cut to" in found.reason) == ("rank-4", False)


def test_a_point_is_held_against_both_bases(task_records: Maker, general_records: Maker) -> None:
    def records(loss: float, probability: float) -> Records:
        return task_records([loss] * 3) + general_records("piqa", [probability] * 3)

    full, own = records(4.0, 0.6), records(4.3, 0.5)
    variant = Variant("rank-8→2", "lora", 2, 15, 1e-3, 8)
    point = place(variant, (full, own), records(3.5, 0.45), trained=False)
    assert isinstance(point, Point)
    assert (point.label, point.rank, point.cut_from, point.trained) == ("rank-8→2", 2, 8, False)
    assert point.gain.mean == pytest.approx(0.5)
    assert point.general is not None
    assert point.general.mean == pytest.approx(-0.05)
