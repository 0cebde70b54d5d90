"""A cut keeps the best directions, costs what was predicted, and is an adapter that PEFT and this library load."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    ConfigError,
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    lora_layers,
    plan_targets,
    save_adapter,
)
from lora_core.adapter.adapter_files import read_identity
from lora_core.spectrum.spectrum import singular_values, truncation_error
from lora_core.spectrum.truncation import (
    rank_pattern,
    recommended_ranks,
    truncate,
    truncate_adapter,
    truncation_table,
)
from lora_core.spectrum.updates import Update, read_updates, write_updates

Build = Callable[..., LlamaForCausalLM]
Make = Callable[..., Update]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
# PEFT 0.21 asks transformers 5.23 under a name that transformers renames in 6; nothing about the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    out=st.integers(1, 12),
    wide=st.integers(1, 12),
    rank=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_cut_is_the_best_of_its_rank(
    random_update: Make, out: int, wide: int, rank: int, seed: int, data: st.DataObject
) -> None:
    """The reference decomposes the dense matrix; factors stored in float32 are off by 6e-8 each."""
    update = random_update(out, wide, rank, scale=1.7, seed=seed)
    lower = data.draw(st.integers(1, rank))
    found, matrix = truncate(update, lower), update.scale * update.b.double() @ update.a.double()
    assert found.rank <= lower
    assert found.scale == update.scale
    product = found.scale * found.b.double() @ found.a.double()
    torch.testing.assert_close(
        product, best_of_rank(matrix, lower), rtol=0, atol=5e-7 * matrix.norm().item()
    )
    assert relative(product, matrix) == pytest.approx(
        truncation_error(singular_values(update), lower), abs=5e-7
    )


def test_the_rank_that_it_has_leaves_an_update_alone(random_update: Make) -> None:
    update = random_update(6, 8, 3)
    assert truncate(update, 3) is update


def test_the_factors_of_a_cut_are_balanced(random_update: Make) -> None:
    update = random_update(6, 8, 4, scale=50.0)
    cut = truncate(update, 2)
    assert (cut.a.dtype, cut.b.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(cut.a.norm(dim=1), cut.b.norm(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_is_no_cut_is_refused(random_update: Make, rank: int) -> None:
    with pytest.raises(
        ConfigError, match=f"rank {rank} for an update of rank 4 must be from 1 to 4"
    ):
        truncate(random_update(6, 8, 4), rank)


# --- folders ---


def test_a_cut_adapter_loads_here_and_in_peft(build_llama: Build, adapter_folder: Path) -> None:
    cut, model = adapter_folder.with_name("cut"), build_llama()
    errors = truncate_adapter(adapter_folder, cut, 2)
    before = read_updates(adapter_folder)
    assert {target.rank for target in load_adapter(model, cut)} == {2}
    theirs = PeftModel.from_pretrained(build_llama(), cut).base_model.model
    for name, layer in lora_layers(model):
        best = best_of_rank(before[name].dense(), 2)
        # ΔW itself is rounded to float32 in the reference, the factors in ours.
        assert relative(layer.delta(), best) < 1e-6
        assert relative(theirs.get_submodule(name).get_delta_weight("default"), best) < 1e-6
        assert errors[name] == pytest.approx(
            relative(layer.delta(), before[name].dense()), abs=1e-6
        )
        assert errors[name] > 0.1


def test_a_cut_by_layer_leaves_the_others_as_they_are(
    build_llama: Build, adapter_folder: Path
) -> None:
    cut, before = adapter_folder.with_name("cut"), read_updates(adapter_folder)
    errors = truncate_adapter(adapter_folder, cut, {Q: 1, DOWN: 3})
    theirs = PeftModel.from_pretrained(build_llama(), cut).base_model.model
    for name, update in before.items():
        module = theirs.get_submodule(name)
        assert module.r["default"] == {Q: 1, DOWN: 3}.get(name, 4)
        assert relative(module.get_delta_weight("default"), update.dense()) == pytest.approx(
            errors[name], abs=1e-6
        )
    assert [name for name, error in errors.items() if error > 0] == [Q, DOWN]


MIXED = [
    LoraConfig(r=6, lora_alpha=12, rank_pattern={r"layers\.0\..*": 3, "down_proj": 5}),
    LoraConfig(
        r=2,
        lora_alpha=3,
        rank_pattern={"q_proj": 7, "k_proj": 4},
        alpha_pattern={"q_proj": 5, "up_proj": 0.5},
    ),
    LoraConfig(
        r=5, lora_alpha=7, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 1}
    ),
]


@pytest.mark.parametrize("config", MIXED, ids=["ranks", "ranks and alphas", "rank-stabilised"])
@pytest.mark.parametrize("rank", [1, 3, {Q: 1, DOWN: 2}], ids=str)
def test_mixed_ranks_are_read_back_as_they_were_cut(
    build_llama: Build, tmp_path: Path, config: LoraConfig, rank: int | dict[str, int]
) -> None:
    """By the updates alone, by a model here, and by PEFT: each layer has its own rank and scale, and is the nearest of its rank."""
    saved, cut = tmp_path / "saved", tmp_path / "cut"
    inject(model := build_llama(), config, seed=1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, saved, config, Identity())
    before, errors = read_updates(saved), truncate_adapter(saved, cut, rank)
    load_adapter(ours := build_llama(), cut)
    here, theirs = (
        dict(lora_layers(ours)),
        PeftModel.from_pretrained(build_llama(), cut).base_model.model,
    )
    after = read_updates(cut)
    assert after.keys() == before.keys() == here.keys() == errors.keys()
    for name, update in before.items():
        expected = min(rank, update.rank) if isinstance(rank, int) else rank.get(name, update.rank)
        assert (
            after[name].rank
            == here[name].lora_A.shape[0]
            == theirs.get_submodule(name).r["default"]
            == expected
        )
        best = best_of_rank(update.dense(), expected)
        for found in (
            after[name].dense(),
            here[name].delta(),
            theirs.get_submodule(name).get_delta_weight("default"),
        ):
            assert relative(found, best) < 2e-6  # two factors and their product in float32


def test_the_lineage_says_what_was_cut(adapter_folder: Path) -> None:
    for number, (rank, words) in enumerate(
        [(3, "truncated to rank 3"), ({Q: 1}, "truncated to rank 1 to 4 by layer")]
    ):
        truncate_adapter(adapter_folder, adapter_folder.with_name(f"cut{number}"), rank)
        identity, parent = (
            read_identity(adapter_folder.with_name(name)) for name in (f"cut{number}", "adapter")
        )
        assert identity is not None
        assert parent is not None
        assert identity["lineage"] == {
            "derived_by": words,
            "derived_from": parent["adapter_sha256"],
        }


def test_cuts_that_mean_nothing_are_refused_and_write_nothing(adapter_folder: Path) -> None:
    destination = adapter_folder.with_name("cut")
    for rank, error, message in (
        (4, ConfigError, "rank 4 truncates nothing"),
        (0, ConfigError, "rank 0 for an update of rank 4"),
        ({Q: 5}, ConfigError, "rank 5 for an update of rank 4"),
        ({"model.layers.0.q_proj": 2}, AdapterError, "no update of model.layers.0.q_proj"),
    ):
        with pytest.raises(error, match=message):
            truncate_adapter(adapter_folder, destination, rank)
    assert not destination.exists()


@pytest.fixture
def uneven_folder(random_update: Make, adapter_folder: Path) -> Path:
    """An adapter whose layers differ: one of a single strong direction, one even, two between."""
    strengths = {Q: [9.0, 0.1, 0.1, 0.1], DOWN: [1.0, 1.0, 1.0, 1.0]}
    updates = {}
    for seed, (name, update) in enumerate(read_updates(adapter_folder).items()):
        left, right = (torch.linalg.qr(torch.randn(size, 4)).Q for size in update.shape)
        updates[name] = Update(
            right.T, left * torch.tensor(strengths.get(name, [4.0, 2.0, 1.0, 0.5 + seed])), 2.0
        )
    folder = adapter_folder.with_name("uneven")
    write_updates(folder, updates, like=adapter_folder, derived_by="made up")
    return folder


def test_recommended_ranks_are_the_smallest_that_keep_the_share(uneven_folder: Path) -> None:
    ranks = recommended_ranks(uneven_folder, fraction=0.9)
    assert (ranks[Q], ranks[DOWN]) == (1, 4)
    for name, update in read_updates(uneven_folder).items():
        values = torch.linalg.svdvals(update.dense().double())[:4]
        shares = values.square().cumsum(0) / values.square().sum()
        assert shares[ranks[name] - 1] >= 0.9
        assert ranks[name] == 1 or shares[ranks[name] - 2] < 0.9


def test_recommended_ranks_can_be_cut_to(uneven_folder: Path) -> None:
    errors = truncate_adapter(
        uneven_folder, uneven_folder.with_name("cut"), recommended_ranks(uneven_folder, fraction=0.9)
    )
    assert all(error**2 <= 0.1 for error in errors.values())


def test_recommended_ranks_become_the_ranks_of_a_next_training(
    build_llama: Build, uneven_folder: Path
) -> None:
    ranks = recommended_ranks(uneven_folder, fraction=0.9)
    assert len(set(ranks.values())) > 1
    for default in (1, 8):  # below and above all of them
        config = LoraConfig(
            r=default, lora_alpha=8, target_modules=tuple(ranks), rank_pattern=rank_pattern(ranks)
        )
        assert {target.name: target.rank for target in plan_targets(build_llama(), config)} == ranks


def test_a_rank_pattern_decides_for_whole_paths(random_update: Make) -> None:
    """`proj` also ends `body.proj`, and a dot matches any sign: whichever key comes first, each module gets its own rank."""
    ranks = {"proj": 1, "body.proj": 2, "bodyxproj": 4}
    for order in (ranks, dict(reversed(ranks.items()))):
        config = LoraConfig(r=3, lora_alpha=3, rank_pattern=rank_pattern(order))
        assert {name: config.rank_of(name) for name in ranks} == ranks


def test_the_table_predicts_what_a_cut_then_costs(build_llama: Build, uneven_folder: Path) -> None:
    before = read_updates(uneven_folder)
    for row in truncation_table(uneven_folder, (1, 2, 3)):
        cut = uneven_folder.with_name(f"cut{row.rank}")
        truncate_adapter(uneven_folder, cut, row.rank)
        after = read_updates(cut)
        errors = [relative(after[name].dense(), before[name].dense()) for name in before]
        kept = sum(after[name].dense().double().square().sum().item() for name in before)
        total = sum(before[name].dense().double().square().sum().item() for name in before)
        assert row.mean_error == pytest.approx(sum(errors) / 4, abs=1e-6)
        assert row.max_error == pytest.approx(max(errors), abs=1e-6)
        assert row.energy == pytest.approx(kept / total, abs=1e-6)
        assert row.weights == sum(update.a.numel() + update.b.numel() for update in after.values())


def test_the_table_beyond_the_rank_costs_nothing(uneven_folder: Path) -> None:
    at, beyond = truncation_table(uneven_folder, [4, 64])
    assert (
        (at.mean_error, at.max_error, at.energy)
        == (beyond.mean_error, beyond.max_error, beyond.energy)
        == (0, 0, 1)
    )
    assert at.weights == beyond.weights == 4 * (2 * (64 + 64) + 2 * (64 + 128))
    with pytest.raises(ConfigError, match="rank 0 must be at least 1"):
        truncation_table(uneven_folder, [0])


def test_an_adapter_at_its_start_can_be_asked(
    build_llama: Build, small_config: LoraConfig, tmp_path: Path
) -> None:
    """B is zero: every rank keeps everything."""
    model = build_llama()
    inject(model, small_config, seed=0)
    save_adapter(model, tmp_path / "start", small_config, Identity())
    assert set(recommended_ranks(tmp_path / "start").values()) == {1}
    [row] = truncation_table(tmp_path / "start", [2])
    assert (row.mean_error, row.max_error, row.energy) == (0, 0, 1)
