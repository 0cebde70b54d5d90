"""Recommended ranks and the table of a truncation agree with truncated adapters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from combined_updates import relative
from transformers import LlamaForCausalLM

from lora_core import ConfigError, Identity, LoraConfig, inject, plan_targets, save_adapter
from lora_core.spectrum.derived_adapter import write_updates
from lora_core.spectrum.truncation import (
    rank_pattern,
    recommended_ranks,
    truncate_adapter,
    truncation_table,
)
from lora_core.spectrum.updates import Update, read_updates

Build = Callable[..., LlamaForCausalLM]
Make = Callable[..., Update]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"

# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def uneven_folder(random_update: Make, adapter_folder: Path) -> Path:
    """An adapter with uneven layers: one strong direction, four equal ones, two in between."""
    strengths = {Q: [9.0, 0.1, 0.1, 0.1], DOWN: [1.0, 1.0, 1.0, 1.0]}
    updates = {}
    for seed, (name, update) in enumerate(read_updates(adapter_folder).items()):
        left, right = (torch.linalg.qr(torch.randn(size, 4)).Q for size in update.shape)
        values = strengths.get(name, [4.0, 2.0, 1.0, 0.5 + seed])
        updates[name] = Update(right.T, left * torch.tensor(values), 2.0)
    folder = adapter_folder.with_name("uneven")
    write_updates(folder, updates, like=adapter_folder, derived_by="made up")
    return folder


def test_recommended_ranks_are_the_smallest_that_retain_the_fraction(uneven_folder: Path) -> None:
    ranks = recommended_ranks(uneven_folder, fraction=0.9)
    assert (ranks[Q], ranks[DOWN]) == (1, 4)
    for name, update in read_updates(uneven_folder).items():
        values = torch.linalg.svdvals(update.dense().double())[:4]
        fractions = values.square().cumsum(0) / values.square().sum()
        rank = ranks[name]
        assert fractions[rank - 1] >= 0.9
        assert rank == 1 or fractions[rank - 2] < 0.9


def test_adapter_can_be_truncated_to_recommended_ranks(uneven_folder: Path) -> None:
    ranks = recommended_ranks(uneven_folder, fraction=0.9)
    errors = truncate_adapter(uneven_folder, uneven_folder.with_name("truncated"), ranks)
    assert all(error**2 <= 0.1 for error in errors.values())


def test_recommended_ranks_can_be_used_for_a_new_run(
    build_llama: Build, uneven_folder: Path
) -> None:
    ranks = recommended_ranks(uneven_folder, fraction=0.9)
    assert len(set(ranks.values())) > 1
    for default in (1, 8):  # below and above all of them
        config = LoraConfig(
            r=default, lora_alpha=8, target_modules=tuple(ranks), rank_pattern=rank_pattern(ranks)
        )
        targets = plan_targets(build_llama(), config)
        assert {target.name: target.rank for target in targets} == ranks


def test_rank_pattern_matches_full_paths(random_update: Make) -> None:
    """Each module gets its rank, whichever key comes first.

    `proj` is also the end of `body.proj`, and a dot matches any character.
    """
    ranks = {"proj": 1, "body.proj": 2, "bodyxproj": 4}
    for order in (ranks, dict(reversed(ranks.items()))):
        config = LoraConfig(r=3, lora_alpha=3, rank_pattern=rank_pattern(order))
        assert {name: config.rank_of(name) for name in ranks} == ranks


def test_table_predicts_the_cost_of_truncation(build_llama: Build, uneven_folder: Path) -> None:
    before = read_updates(uneven_folder)
    for row in truncation_table(uneven_folder, (1, 2, 3)):
        truncated = uneven_folder.with_name(f"truncated{row.rank}")
        truncate_adapter(uneven_folder, truncated, row.rank)
        after = read_updates(truncated)
        errors = [relative(after[name].dense(), before[name].dense()) for name in before]
        retained = squared_norm(after)
        total = squared_norm(before)
        assert row.mean_error == pytest.approx(sum(errors) / 4, abs=1e-6)
        assert row.max_error == pytest.approx(max(errors), abs=1e-6)
        assert row.energy == pytest.approx(retained / total, abs=1e-6)
        assert row.weights == sum(update.a.numel() + update.b.numel() for update in after.values())


def squared_norm(updates: dict[str, Update]) -> float:
    norms = [update.dense().double().square().sum().item() for update in updates.values()]
    return sum(norms)


def test_ranks_at_or_above_the_adapters_cost_nothing(uneven_folder: Path) -> None:
    for row in truncation_table(uneven_folder, [4, 64]):
        assert (row.mean_error, row.max_error, row.energy) == (0, 0, 1)
        assert row.weights == 4 * (2 * (64 + 64) + 2 * (64 + 128))
    with pytest.raises(ConfigError, match="rank 0 must be at least 1"):
        truncation_table(uneven_folder, [0])


def test_adapter_at_step_zero_loses_nothing(
    build_llama: Build, small_config: LoraConfig, tmp_path: Path
) -> None:
    """B is zero: every rank retains everything."""
    model = build_llama()
    inject(model, small_config, seed=0)
    save_adapter(model, tmp_path / "initial", small_config, Identity())
    assert set(recommended_ranks(tmp_path / "initial").values()) == {1}
    [row] = truncation_table(tmp_path / "initial", [2])
    assert (row.mean_error, row.max_error, row.energy) == (0, 0, 1)
