"""A combination is the weighted sum of the dense updates, or its best approximation of a rank."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from combined_updates import best_of_rank, relative, weighted_sum
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core import (
    AdapterError,
    ConfigError,
)
from lora_core.spectrum.combining import combine
from lora_core.spectrum.updates import Update

Make = Callable[..., Update]
WEIGHTS = [0.7, -0.4]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    out=st.integers(1, 10),
    wide=st.integers(1, 10),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    weights=st.lists(st.integers(-2000, 2000), min_size=4, max_size=4),
)
def test_cat_is_the_weighted_sum(
    random_update: Make, out: int, wide: int, ranks: list[int], weights: list[int]
) -> None:
    """The scales differ; sums of up to 20 terms are rounded to float32 in another order.

    The weights are in thousandths: much smaller ones underflow in float32.
    """
    factors = [weight / 1000 for weight in weights[: len(ranks)]]
    updates = [
        random_update(out, wide, rank, scale=0.5 + seed, seed=seed)
        for seed, rank in enumerate(ranks)
    ]
    result = combine([{"x": update} for update in updates], factors, method="cat")
    found = result.updates["x"]
    size = 0.0
    for update, factor in zip(updates, factors, strict=True):
        size += abs(factor) * update.dense().norm().item()
    expected = weighted_sum(updates, factors)
    torch.testing.assert_close(found.dense().double(), expected, rtol=0, atol=2e-6 * size)
    assert found.rank == min(sum(ranks), out, wide)
    assert result.relative_errors == {"x": 0.0}


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_is_the_best_of_its_rank_and_reports_its_error(random_update: Make, rank: int) -> None:
    updates = [
        random_update(12, 20, 4, scale=2.0, seed=1),
        random_update(12, 20, 3, scale=0.3, seed=2),
    ]
    result = combine([{"x": update} for update in updates], WEIGHTS, method="svd", rank=rank)
    exact = weighted_sum(updates, WEIGHTS)
    found = result.updates["x"].dense()
    assert relative(found, best_of_rank(exact, rank)) < 1e-6  # factors and their product in float32
    assert result.relative_errors["x"] == pytest.approx(relative(found, exact), abs=1e-6)
    assert result.relative_errors["x"] > 1e-3
    assert result.updates["x"].rank == rank


def test_svd_at_the_sum_of_the_ranks_loses_nothing(random_update: Make) -> None:
    updates = [{"x": random_update(12, 20, rank, seed=rank)} for rank in (2, 3)]
    found = combine(updates, WEIGHTS, method="svd", rank=9)
    exact = combine(updates, WEIGHTS, method="cat")
    assert found.updates["x"].rank == 5
    assert found.relative_errors["x"] == 0
    assert relative(found.updates["x"].dense(), exact.updates["x"].dense()) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cat"},
        {"method": "svd", "rank": 2},
        {"method": "ties", "rank": 2, "density": 1.0},
        {"method": "dare", "rank": 2, "density": 1.0, "seed": 0},
    ],
    ids=lambda options: options["method"],
)
def test_single_adapter_is_scaled_by_its_weight(
    random_update: Make, options: dict[str, Any]
) -> None:
    update = random_update(8, 9, 2, scale=3.0)
    found = combine([{"x": update}], [-0.5], **options)
    assert relative(found.updates["x"].dense(), -0.5 * update.dense()) < 1e-6
    assert found.relative_errors["x"] < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cat"},
        {"method": "svd", "rank": 6},
        {"method": "ties", "rank": 6, "density": 0.5},
        {"method": "dare", "rank": 6, "density": 0.5, "seed": 0},
    ],
    ids=lambda options: options["method"],
)
def test_layer_that_an_adapter_lacks_counts_as_zero(
    random_update: Make, options: dict[str, Any]
) -> None:
    """As if the adapter had the layer with B = 0."""
    x = random_update(6, 9, 2, seed=1)
    y = random_update(6, 9, 2, seed=2)
    zero = Update(y.a, torch.zeros_like(y.b), 1.0)
    found = combine([{"x": x}, {"y": y}], WEIGHTS, **options)
    expected = combine([{"x": x, "y": zero}, {"x": zero, "y": y}], WEIGHTS, **options)
    assert list(found.updates) == list(found.relative_errors) == ["x", "y"]
    for name in "xy":
        assert relative(found.updates[name].dense(), expected.updates[name].dense()) < 1e-6


def test_inputs_do_not_change(random_update: Make) -> None:
    update = random_update(6, 9, 2, scale=2.0)
    a = update.a.clone()
    b = update.b.clone()
    for options in ({"method": "cat"}, {"method": "ties", "rank": 1, "density": 0.2}):
        combine([{"x": update}, {"x": update}], WEIGHTS, **options)
    assert torch.equal(update.a, a)
    assert torch.equal(update.b, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "linear"}, "use 'cat', which is exact"),
        ({"method": "slerp"}, "method='slerp' is unknown; use one of cat, svd, ties, dare"),
        ({"method": "cat", "rank": 4}, "'cat' takes no option and was given rank"),
        ({"method": "svd"}, "'svd' takes rank and was given no option"),
        ({"method": "svd", "rank": 4, "seed": 0}, "was given rank and seed"),
        ({"method": "ties", "rank": 4}, "takes density and rank"),
        ({"method": "dare", "rank": 4, "density": 0.5}, "takes density and rank and seed"),
        ({"method": "svd", "rank": 0}, "rank 0 must be at least 1"),
        ({"method": "ties", "rank": 4, "density": 0.0}, "density=0.0"),
        ({"method": "ties", "rank": 4, "density": 1.5}, "density=1.5"),
        ({"method": "ties", "rank": 4, "density": math.nan}, "density=nan"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(
    random_update: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        combine([{"x": random_update(6, 9, 2)}], [1.0], **options)


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 1.0, 1.0], [1.0, math.inf], [math.nan, 1.0]], ids=str
)
def test_invalid_weights_are_refused(random_update: Make, weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        combine([{"x": random_update(6, 9, 2)}] * 2, weights, method="cat")


def test_no_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one adapter"):
        combine([], [], method="cat")


def test_layers_of_different_shapes_are_refused(random_update: Make) -> None:
    with pytest.raises(AdapterError, match=r"x is updated with the shapes \[\(6, 9\), \(9, 6\)\]"):
        combine(
            [{"x": random_update(6, 9, 2)}, {"x": random_update(9, 6, 2)}], WEIGHTS, method="cat"
        )
