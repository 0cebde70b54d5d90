"""Updates that are read from a folder are those of the saved model; other adapters are refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    BaseMismatchError,
    Identity,
    LoraConfig,
    inject,
    lora_layers,
    save_adapter,
)
from lora_core.spectrum.derived_adapter import write_updates
from lora_core.spectrum.updates import Update, read_over_one_base, read_updates

Build = Callable[..., LlamaForCausalLM]
Make = Callable[..., Update]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SIDECAR = "adapter_identity.json"
LAYER = "model.layers.1.self_attn.q_proj"
KEY_A = f"base_model.model.{LAYER}.lora_A.weight"
KEY_B = f"base_model.model.{LAYER}.lora_B.weight"


def damage(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and delete the sidecar, whose digest would refuse the folder first."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SIDECAR).unlink()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


# --- one update ---


def test_dense_is_the_product_times_the_scale(random_update: Make) -> None:
    update = random_update(5, 7, 2, scale=3.0)
    assert (update.rank, update.shape, update.dense().shape) == (2, (5, 7), (5, 7))
    expected = 3.0 * torch.einsum("or,ri->oi", update.b.double(), update.a.double())
    torch.testing.assert_close(update.dense().double(), expected, rtol=1e-6, atol=1e-6)


def test_folded_update_is_the_same_with_scale_one(random_update: Make) -> None:
    update = random_update(5, 7, 2, scale=0.3)
    folded = update.folded()
    assert folded.scale == 1.0
    torch.testing.assert_close(folded.dense(), update.dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 7), (5, 3)), ((2, 7), (5,)), ((2, 7, 1), (5, 2)), ((0, 7), (5, 0))],
    ids=["ranks", "vector", "kernel", "rank 0"],
)
def test_factors_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match=r"give A \(r, in\), B \(out, r\)"):
        Update(torch.zeros(a), torch.zeros(b), 1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_invalid_scale_is_refused(scale: float) -> None:
    with pytest.raises(AdapterError, match="put a sign or a zero into B"):
        Update(torch.zeros(2, 7), torch.zeros(5, 2), scale)


# --- reading ---


@pytest.mark.parametrize("rslora", [False, True])
def test_updates_are_bit_exact(
    build_llama: Build, randomize: Callable[[nn.Module], None], tmp_path: Path, rslora: bool
) -> None:
    model = build_llama()
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=rslora)
    inject(model, config, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    updates = read_updates(tmp_path / "adapter")
    assert list(updates) == sorted(name for name, _ in lora_layers(model))
    for name, layer in lora_layers(model):
        assert torch.equal(updates[name].dense(), layer.delta())


def test_adapter_stored_in_bfloat16_is_read_in_float32(adapter_folder: Path) -> None:
    def round_all(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            tensors[key] = tensor.bfloat16()

    damage(adapter_folder, round_all)
    for update in read_updates(adapter_folder).values():
        assert update.a.dtype == torch.float32
        assert update.b.dtype == torch.float32


def added(key: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    """Add or replace a tensor."""
    return lambda tensors: tensors.update({key: torch.ones(shape)})


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "half a pair": (lambda tensors: tensors.pop(KEY_A), f"lora_B of {LAYER} alone"),
    "magnitude": (
        added(f"base_model.model.{LAYER}.lora_magnitude_vector", 64),
        "magnitude_vec",
    ),
    "embedding": (
        added("base_model.model.model.embed_tokens.lora_embedding_A", 4, 9),
        "embedding_A",
    ),
    "full weight": (added("base_model.model.lm_head.weight", 9, 4), "lm_head.weight"),
    "rank": (added(KEY_B, 64, 3), rf"{LAYER} of .*B of \(64, 3\)"),
    "kernel": (added(KEY_A, 4, 64, 1), "not the factors of one weight"),
    "nan": (lambda tensors: tensors[KEY_A].fill_(math.nan), "not finite"),
    "nothing": (lambda tensors: tensors.clear(), "holds no tensor"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_adapter_that_is_not_purely_low_rank_is_refused(
    adapter_folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    damage(adapter_folder, change)
    with pytest.raises(AdapterError, match=message):
        read_updates(adapter_folder)


def test_rank_that_differs_from_the_config_is_refused(adapter_folder: Path) -> None:
    """Its scale, alpha over the config's rank, would be wrong."""

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors[KEY_A] = tensors[KEY_A][:2].clone()
        tensors[KEY_B] = tensors[KEY_B][:, :2].clone()

    damage(adapter_folder, halve)
    with pytest.raises(AdapterError, match="rank is 2, but the config gives 4"):
        read_updates(adapter_folder)


def test_file_that_differs_from_its_sidecar_is_refused(adapter_folder: Path) -> None:
    file = adapter_folder / WEIGHTS
    doubled = {key: 2 * tensor for key, tensor in load_file(file).items()}
    save_file(doubled, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="sidecar records"):
        read_updates(adapter_folder)


def test_stacks_of_experts_are_refused(adapter_folder: Path) -> None:
    """Their factors look like those of a linear layer with the ranks of all experts together."""
    (adapter_folder / SIDECAR).unlink()
    values = {**config_of(adapter_folder), "target_parameters": ["experts.down_proj"]}
    (adapter_folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"updates stacks of experts \(experts.down_proj\)"):
        read_updates(adapter_folder)


# --- several adapters ---


@pytest.fixture
def folder_of(random_update: Make, adapter_folder: Path) -> Callable[..., Path]:
    """Write adapters next to `adapter_folder` with the given values in their sidecars."""

    def make(name: str, **sidecar: object) -> Path:
        folder = adapter_folder.with_name(name)
        updates = {LAYER: random_update(64, 64, 2)}
        write_updates(folder, updates, like=adapter_folder, derived_by="made up")
        identity = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        (folder / SIDECAR).write_text(json.dumps({**identity, **sidecar}), encoding="utf-8")
        return folder

    return make


def test_adapters_of_one_base_are_read_together(
    adapter_folder: Path, folder_of: Callable[..., Path]
) -> None:
    folders = [adapter_folder, folder_of("copy"), folder_of("in nf4", base_digests={"nf4": "n"})]
    (folder_of("theirs") / SIDECAR).unlink()
    found = read_over_one_base([*folders, adapter_folder.with_name("theirs")])
    assert [len(updates) for updates in found] == [4, 1, 1, 1]


@pytest.mark.parametrize(
    "sidecar",
    [{"base_digests": {"dense": "other"}}, {"base_digests": {"nf4": "n"}, "base": "other"}],
    ids=str,
)
def test_adapters_of_different_bases_are_refused(
    adapter_folder: Path, folder_of: Callable[..., Path], sidecar: dict[str, object]
) -> None:
    with pytest.raises(BaseMismatchError, match="combine adapters of one base"):
        read_over_one_base([adapter_folder, folder_of("other", **sidecar)])
