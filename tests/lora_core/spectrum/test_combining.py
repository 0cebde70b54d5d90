"""A combination is the weighted sum of the dense updates, or its best approximation of a rank.

The references are sums of dense matrices, TIES entry by entry, and PEFT if it computes the same
sum.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    ConfigError,
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lora_core.spectrum.combining import combine
from lora_core.spectrum.updates import Update, read_over_one_base, write_updates

Build = Callable[..., LlamaForCausalLM]
Make = Callable[..., Update]
Save = Callable[..., Path]
WEIGHTS = [0.7, -0.4]
# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def weighted_sum(updates: list[Update], weights: list[float]) -> Tensor:
    return sum(
        weight * update.scale * (update.b.double() @ update.a.double())
        for update, weight in zip(updates, weights, strict=True)
    )


def full_rank_delta(
    updates: list[dict[str, Update]], weights: list[float], **options: Any
) -> Tensor:
    """Return the combined ΔW of the layer `x` at full rank."""
    shape = updates[0]["x"].shape
    return combine(updates, weights, rank=min(shape), **options).updates["x"].dense()


# --- cat and svd ---


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


# --- TIES and DARE ---


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


# --- invalid input ---


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


# --- files, and comparison with PEFT ---


@pytest.fixture
def save(build_llama: Build, tmp_path: Path) -> Save:
    """Save adapters of one base, with noise in B."""

    def make(name: str, *targets: str, rank: int, rslora: bool = False, seed: int = 0) -> Path:
        model = build_llama()
        config = LoraConfig(r=rank, lora_alpha=6, target_modules=targets, use_rslora=rslora)
        inject(model, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, layer in lora_layers(model):
            layer.lora_B.data.normal_(std=0.2, generator=generator)
        save_adapter(model, tmp_path / name, config, Identity(base="tiny llama"))
        return tmp_path / name

    return make


@pytest.fixture
def in_peft(build_llama: Build) -> Callable[..., PeftModel]:
    """Load several adapters into one PEFT model."""

    def load(*folders: Path) -> PeftModel:
        model = PeftModel.from_pretrained(build_llama(), folders[0], adapter_name=folders[0].name)
        for folder in folders[1:]:
            model.load_adapter(folder, adapter_name=folder.name)
        return model

    return load


def deltas(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A:
            found[name] = module.get_delta_weight(adapter)
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "cat"}, {"combination_type": "cat"}),
        ({"method": "svd", "rank": 3}, {"combination_type": "svd", "svd_rank": 3}),
        (
            {"method": "ties", "rank": 5, "density": 0.25},
            {"combination_type": "ties_svd", "svd_rank": 5, "density": 0.25},
        ),
    ],
    ids=["cat", "svd", "ties"],
)
def test_sum_agrees_with_peft(
    save: Save, in_peft: Callable[..., PeftModel], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Only with alpha/r, for which PEFT's scale is right.

    For TIES the weights are equal: PEFT elects signs before weighting, this library after.
    """
    folders = [
        save("one", "q_proj", "up_proj", rank=4, seed=1),
        save("two", "q_proj", "down_proj", rank=2, seed=2),
    ]
    weights = [0.5, 0.5] if ours["method"] == "ties" else WEIGHTS
    found = combine(read_over_one_base(folders), weights, **ours).updates
    model = in_peft(*folders)
    model.add_weighted_adapter(["one", "two"], weights, "both", **theirs)
    expected = deltas(model, "both")
    assert found.keys() == expected.keys()
    for name, update in found.items():
        # Both truncate the same matrix, in float32 or float64: the gap between kept and lost
        # values amplifies 6e-8.
        assert relative(update.dense(), expected[name]) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_written_combination_is_the_sum_of_what_peft_loads(
    save: Save, in_peft: Callable[..., PeftModel], tmp_path: Path, rslora: bool
) -> None:
    """Also with alpha/√r, for which PEFT's sum is too large by the root of the new rank.

    The ranks differ.
    """
    folders = [
        save("one", "q_proj", "up_proj", rank=4, rslora=rslora, seed=1),
        save("two", "q_proj", "down_proj", rank=2, rslora=rslora, seed=2),
    ]
    result = combine(read_over_one_base(folders), WEIGHTS, method="cat")
    write_updates(
        tmp_path / "both",
        result.updates,
        like=folders[0],
        derived_by="one · 0.7 and two · -0.4 by cat",
        parents=folders,
    )
    model = in_peft(*folders, tmp_path / "both")
    one, two, both = (deltas(model, name) for name in ("one", "two", "both"))
    assert both.keys() == one.keys() | two.keys()
    for name, found in both.items():
        expected = torch.zeros_like(found)
        for weight, each in zip(WEIGHTS, (one, two), strict=True):
            if name in each:
                expected += weight * each[name]
        assert relative(found, expected) < 1e-6


def test_written_combination_loads_into_a_model(
    save: Save, build_llama: Build, tmp_path: Path
) -> None:
    folders = [
        save("one", "q_proj", "up_proj", rank=4, rslora=True, seed=1),
        save("two", "q_proj", "down_proj", rank=4, seed=2),
    ]
    read = read_over_one_base(folders)
    result = combine(read, WEIGHTS, method="svd", rank=4)
    folder = tmp_path / "both"
    write_updates(folder, result.updates, like=folders[0], derived_by="a sum", parents=folders)
    model = build_llama()
    load_adapter(model, folder)
    layers: dict[str, nn.Module] = dict(lora_layers(model))
    assert sorted(layers) == sorted(result.updates)
    for name, layer in layers.items():
        exact = torch.zeros(1, dtype=torch.float64)
        for updates, weight in zip(read, WEIGHTS, strict=True):
            if name in updates:
                exact = exact + weighted_sum([updates[name]], [weight])
        error = relative(layer.delta(), exact)
        assert error == pytest.approx(result.relative_errors[name], abs=1e-6)
