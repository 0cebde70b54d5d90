"""TIES agrees with the rule entry by entry, and DARE is the weighted sum on average."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from combined_updates import best_of_rank, full_rank_delta, relative, weighted_sum
from torch import Tensor

from lora_core.spectrum.combining import combine
from lora_core.spectrum.updates import Update

Make = Callable[..., Update]
WEIGHTS = [0.7, -0.4]


def ties_by_hand(deltas: list[Tensor], density: float) -> Tensor:
    """Trim, elect and average the agreeing entries, one entry at a time."""
    trimmed = []
    for delta in deltas:
        magnitudes = delta.abs().flatten().sort(descending=True).values
        bound = magnitudes[round(density * delta.numel()) - 1]
        trimmed.append(torch.where(delta.abs() >= bound, delta, torch.zeros_like(delta)))
    merged = torch.zeros_like(deltas[0])
    for index in range(merged.numel()):
        entries = [delta.flatten()[index].item() for delta in trimmed]
        sign = math.copysign(1, sum(entries))
        agreeing = [entry for entry in entries if entry * sign > 0]
        merged.view(-1)[index] = sum(agreeing) / max(len(agreeing), 1)
    return merged


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages(random_update: Make, density: float) -> None:
    updates = [random_update(8, 10, 3, scale=0.5 + seed, seed=seed) for seed in range(3)]
    weights = [1.0, 0.5, -0.3]
    pairs = zip(weights, updates, strict=True)
    expected = ties_by_hand([weight * update.dense() for weight, update in pairs], density)
    found = full_rank_delta(
        [{"x": update} for update in updates], weights, method="ties", density=density
    )
    assert relative(found, expected) < 2e-6  # eight directions in float32 factors


def test_ties_by_hand_on_four_entries() -> None:
    """At a density of 3/4, 9 and 3 agree, 8 outvotes -6, and only -7 and 5 are left.

    1 and 2 are trimmed.
    """
    rows = ([[9.0, 8.0, 1.0, 5.0]], [[3.0, -6.0, -7.0, 2.0]])
    updates = [{"x": Update(torch.tensor(row), torch.ones(1, 1), 1.0)} for row in rows]
    found = full_rank_delta(updates, [1, 1], method="ties", density=0.75)
    assert found.flatten().tolist() == pytest.approx([6, 8, -7, 5], rel=1e-6)


def test_ties_drops_an_entry_whose_votes_cancel() -> None:
    updates = [
        {"x": Update(torch.tensor([[value, 1.0]]), torch.ones(1, 1), 1.0)} for value in (2.0, -2.0)
    ]
    found = full_rank_delta(updates, [1, 1], method="ties", density=1.0)
    assert found.flatten().tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_dare_scales_the_entries_that_it_keeps(random_update: Make, density: float) -> None:
    update = random_update(30, 40, 3)
    found = full_rank_delta([{"x": update}], [1.0], method="dare", density=density, seed=4)
    ratio = found / update.dense()
    kept = ratio.abs() > 0.5 / density
    # Some entries of ΔW are close to zero, where the error of the factors is relatively large.
    assert ratio[kept].median().item() == pytest.approx(1 / density, rel=1e-4)
    if density < 1:
        assert ratio[~kept].abs().median().item() < 1e-3
    else:
        assert kept.all()
    # 1200 draws: the fraction has a standard deviation of √(0.3 · 0.7 / 1200) = 0.013.
    assert kept.float().mean().item() == pytest.approx(density, abs=0.06)


def test_dare_is_the_weighted_sum_on_average(random_update: Make) -> None:
    """The mean of 400 draws is off by √((1/p − 1) / 400) = 0.05 of each norm at p = 0.5."""
    updates = [{"x": random_update(10, 12, 3, seed=seed)} for seed in (1, 2)]
    options = {"method": "dare", "density": 0.5}
    draws = [full_rank_delta(updates, WEIGHTS, seed=seed, **options) for seed in range(400)]
    exact = weighted_sum([update["x"] for update in updates], WEIGHTS)
    assert relative(torch.stack(draws).mean(0), exact) < 0.1
    assert relative(draws[0], exact) > 0.5


def test_dare_repeats_by_seed_and_draws_by_adapter_and_layer(random_update: Make) -> None:
    update = random_update(20, 20, 20)
    adapter = {"x": update, "y": update}

    def draw(seed: int, *adapters: dict[str, Update]) -> dict[str, Update]:
        return combine(
            adapters, [1.0] * len(adapters), method="dare", rank=20, density=0.5, seed=seed
        ).updates

    first = draw(0, adapter)
    assert torch.equal(first["x"].dense(), draw(0, adapter)["x"].dense())
    assert torch.equal(first["x"].dense(), draw(0, {"x": update})["x"].dense())
    for other in (first["y"], draw(1, adapter)["x"]):
        assert relative(other.dense(), first["x"].dense()) > 0.3
    twice = draw(0, adapter, adapter)["x"].dense()
    assert relative(twice, 2 * first["x"].dense()) > 0.3


@pytest.mark.parametrize(
    "options",
    [{"method": "ties", "density": 0.2}, {"method": "dare", "density": 0.5, "seed": 0}],
    ids=str,
)
def test_truncation_error_of_a_dense_result_is_reported(
    random_update: Make, options: dict[str, Any]
) -> None:
    updates = [{"x": random_update(12, 20, 3, seed=seed)} for seed in (1, 2)]
    exact = full_rank_delta(updates, [1, 1], **options)
    truncated = combine(updates, [1, 1], rank=4, **options)
    found = truncated.updates["x"].dense()
    # The reference uses float32 factors too.
    assert relative(found, best_of_rank(exact, 4)) < 3e-6
    assert truncated.relative_errors["x"] == pytest.approx(relative(found, exact), abs=1e-6)
    assert truncated.relative_errors["x"] > 0.1
