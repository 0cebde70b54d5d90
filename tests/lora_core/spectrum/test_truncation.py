"""A truncated adapter has the best update of its rank, the predicted error, and loads in PEFT."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from combined_updates import best_of_rank, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
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
from lora_core.adapter.json_files import read_identity
from lora_core.spectrum.spectrum import singular_values, truncation_error
from lora_core.spectrum.truncation import truncate, truncate_adapter
from lora_core.spectrum.updates import Update, read_updates

Build = Callable[..., LlamaForCausalLM]
Make = Callable[..., Update]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"

# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    out=st.integers(1, 12),
    wide=st.integers(1, 12),
    rank=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_truncated_update_is_the_best_of_its_rank(
    random_update: Make, out: int, wide: int, rank: int, seed: int, data: st.DataObject
) -> None:
    """The reference decomposes the dense matrix; factors stored in float32 are off by 6e-8 each."""
    update = random_update(out, wide, rank, scale=1.7, seed=seed)
    lower = data.draw(st.integers(1, rank))
    found = truncate(update, lower)
    matrix = update.scale * update.b.double() @ update.a.double()
    assert found.rank <= lower
    assert found.scale == update.scale
    product = found.scale * found.b.double() @ found.a.double()
    best = best_of_rank(matrix, lower)
    torch.testing.assert_close(product, best, rtol=0, atol=5e-7 * matrix.norm().item())
    predicted = truncation_error(singular_values(update), lower)
    assert relative(product, matrix) == pytest.approx(predicted, abs=5e-7)


def test_update_of_that_rank_is_returned_unchanged(random_update: Make) -> None:
    update = random_update(6, 8, 3)
    assert truncate(update, 3) is update


def test_truncated_factors_are_balanced(random_update: Make) -> None:
    update = random_update(6, 8, 4, scale=50.0)
    truncated = truncate(update, 2)
    assert (truncated.a.dtype, truncated.b.dtype) == (torch.float32, torch.float32)
    norms = truncated.b.norm(dim=0)
    torch.testing.assert_close(truncated.a.norm(dim=1), norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range_is_refused(random_update: Make, rank: int) -> None:
    with pytest.raises(
        ConfigError, match=f"rank {rank} for an update of rank 4 must be from 1 to 4"
    ):
        truncate(random_update(6, 8, 4), rank)


def test_truncated_adapter_loads_here_and_in_peft(build_llama: Build, adapter_folder: Path) -> None:
    truncated = adapter_folder.with_name("truncated")
    model = build_llama()
    errors = truncate_adapter(adapter_folder, truncated, 2)
    before = read_updates(adapter_folder)
    assert {target.rank for target in load_adapter(model, truncated)} == {2}
    theirs = PeftModel.from_pretrained(build_llama(), truncated).base_model.model
    for name, layer in lora_layers(model):
        best = best_of_rank(before[name].dense(), 2)
        # ΔW itself is rounded to float32 in the reference, the factors in ours.
        assert relative(layer.delta(), best) < 1e-6
        assert relative(theirs.get_submodule(name).get_delta_weight("default"), best) < 1e-6
        error = relative(layer.delta(), before[name].dense())
        assert errors[name] == pytest.approx(error, abs=1e-6)
        assert errors[name] > 0.1


def test_truncation_by_layer_does_not_change_other_layers(
    build_llama: Build, adapter_folder: Path
) -> None:
    truncated = adapter_folder.with_name("truncated")
    ranks = {Q: 1, DOWN: 3}
    errors = truncate_adapter(adapter_folder, truncated, ranks)
    theirs = PeftModel.from_pretrained(build_llama(), truncated).base_model.model
    for name, update in read_updates(adapter_folder).items():
        module = theirs.get_submodule(name)
        assert module.r["default"] == ranks.get(name, 4)
        error = relative(module.get_delta_weight("default"), update.dense())
        assert error == pytest.approx(errors[name], abs=1e-6)
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


@pytest.mark.parametrize("config", MIXED, ids=["ranks", "ranks and alphas", "rank-stabilized"])
@pytest.mark.parametrize("rank", [1, 3, {Q: 1, DOWN: 2}], ids=str)
def test_mixed_ranks_load_as_they_were_truncated(
    build_llama: Build, tmp_path: Path, config: LoraConfig, rank: int | dict[str, int]
) -> None:
    """`read_updates`, a model here and PEFT find the same rank and best update per layer."""
    saved = tmp_path / "saved"
    truncated = tmp_path / "truncated"
    model = build_llama()
    inject(model, config, seed=1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, saved, config, Identity())
    before = read_updates(saved)
    errors = truncate_adapter(saved, truncated, rank)
    loaded = build_llama()
    load_adapter(loaded, truncated)
    ours = dict(lora_layers(loaded))
    peft = PeftModel.from_pretrained(build_llama(), truncated).base_model.model
    after = read_updates(truncated)
    assert after.keys() == before.keys() == ours.keys() == errors.keys()
    for name, update in before.items():
        expected = min(rank, update.rank) if isinstance(rank, int) else rank.get(name, update.rank)
        theirs = peft.get_submodule(name)
        assert after[name].rank == expected
        assert ours[name].lora_A.shape[0] == expected
        assert theirs.r["default"] == expected
        best = best_of_rank(update.dense(), expected)
        # Two factors and their product in float32.
        assert relative(after[name].dense(), best) < 2e-6
        assert relative(ours[name].delta(), best) < 2e-6
        assert relative(theirs.get_delta_weight("default"), best) < 2e-6


@pytest.mark.parametrize(
    ("rank", "derived_by"),
    [(3, "truncated to rank 3"), ({Q: 1}, "truncated to rank 1 to 4 by layer")],
    ids=["all", "by layer"],
)
def test_lineage_records_the_truncation(
    adapter_folder: Path, rank: int | dict[str, int], derived_by: str
) -> None:
    truncated = adapter_folder.with_name("truncated")
    truncate_adapter(adapter_folder, truncated, rank)
    identity = read_identity(truncated)
    parent = read_identity(adapter_folder)
    assert identity is not None
    assert parent is not None
    digest = parent["adapter_sha256"]
    assert identity["lineage"] == {"derived_by": derived_by, "derived_from": digest}


def test_invalid_truncations_are_refused_and_write_nothing(adapter_folder: Path) -> None:
    destination = adapter_folder.with_name("truncated")
    for rank, error, message in (
        (4, ConfigError, "rank 4 truncates nothing"),
        (0, ConfigError, "rank 0 for an update of rank 4"),
        ({Q: 5}, ConfigError, "rank 5 for an update of rank 4"),
        ({"model.layers.0.q_proj": 2}, AdapterError, "no update of model.layers.0.q_proj"),
    ):
        with pytest.raises(error, match=message):
            truncate_adapter(adapter_folder, destination, rank)
    assert not destination.exists()
