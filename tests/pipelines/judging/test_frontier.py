"""Of the adapters that pass, the lowest rank that learnt as much is recommended, and the reason is in the numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelines.judging.frontier import Point, Recommendation, Variant, place, recommend

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
        return task_records(list(loss + rng.normal(0, noise, ITEMS))) + general_records("piqa", [0.5] * ITEMS)

    def run(losses: dict[int, float], *, noise: float = 0.01, passed: tuple[int, ...] | None = None, cuts: dict[int, float] = {}) -> Any:  # noqa: B006
        highest, variants = max(losses), []
        items = {"base": records(4.0, noise, 0)}
        for rank, loss in losses.items():
            items[f"rank-{rank}"] = records(loss, noise, rank)
            variants.append((Variant(f"rank-{rank}", "lora", rank, 15, 1e-3), True))
        for rank, loss in cuts.items():
            items[f"rank-{highest}→{rank}"] = records(loss, noise, 100 + rank)
            variants.append((Variant(f"rank-{highest}→{rank}", "lora", rank, 15, 1e-3, highest), False))
        bases = (items["base"], items["base"])
        points = [place(variant, bases, items[variant.label], trained=trained) for variant, trained in variants]
        return recommend(points, [f"rank-{rank}" for rank in (losses if passed is None else passed)], items)

    return run


def test_a_lower_rank_that_learnt_as_much_is_recommended(recommended: Recommend) -> None:
    found = recommended({4: 3.0, 16: 2.99, 64: 2.96}, noise=0.1)
    assert found is not None
    assert found.label == "rank-4"
    assert found.reason.startswith("rank-4 has the lowest rank whose task gain (+")
    assert "is not surely lower than that of rank-64 (+" in found.reason
    assert found.reason.endswith(" on the same items")


def test_a_lower_rank_that_surely_learnt_less_is_not(recommended: Recommend) -> None:
    found = recommended({4: 3.2, 16: 3.0, 64: 3.0}, noise=0.02)
    assert found is not None
    assert found.label == "rank-16"


def test_where_every_lower_rank_learnt_less_the_best_is_recommended_and_says_so(recommended: Recommend) -> None:
    found = recommended({4: 3.4, 16: 3.2, 64: 3.0})
    assert found is not None
    assert found.label == "rank-64"
    assert found.reason.startswith("rank-64 gains most (+")
    assert all(part in found.reason for part in ("each lower rank that passes surely gains less", ": rank-4 0.", "; rank-16 0."))


def test_a_best_that_has_the_lowest_rank_needs_no_comparison(recommended: Recommend) -> None:
    found = recommended({4: 3.0, 16: 3.2})
    assert found is not None
    assert (found.label, "has the lowest rank of them" in found.reason) == ("rank-4", True)


def test_only_what_passes_is_recommended(recommended: Recommend) -> None:
    found = recommended({4: 3.0, 16: 3.0, 64: 2.9}, passed=(16,))
    assert found == Recommendation("rank-16", "rank-16 is the only one that passes")
    assert recommended({4: 3.0, 16: 3.0}, passed=()) is None


def test_the_comparison_is_paired(recommended: Recommend, task_records: Maker) -> None:
    """Examples differ by a nat and the two ranks by 0.02 on each: unpaired intervals would overlap, paired ones do not."""
    easy = np.random.default_rng(1).uniform(1, 5, ITEMS)
    items = {label: task_records(list(easy + loss)) for label, loss in (("base", 0.5), ("rank-4", 0.02), ("rank-16", 0.0))}
    variants = [Variant("rank-4", "lora", 4, 15, 1e-3), Variant("rank-16", "lora", 16, 15, 1e-3)]
    points = [place(variant, (items["base"], items["base"]), items[variant.label], trained=True) for variant in variants]
    found = recommend(points, ["rank-4", "rank-16"], items)
    assert found is not None
    assert found.label == "rank-16"


def test_a_cut_that_keeps_the_gain_is_named_and_not_recommended(recommended: Recommend) -> None:
    found = recommended({16: 3.2, 64: 3.0}, noise=0.02, cuts={32: 3.0, 8: 3.001, 4: 3.5})
    assert found is not None
    assert found.label == "rank-64"
    assert "; rank 64 cut to 8 is not surely behind it either" in found.reason
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
