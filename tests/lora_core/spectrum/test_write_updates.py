"""Written adapters are read back unchanged, and PEFT computes with them what was written."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lora_core.adapter.json_files import read_identity
from lora_core.files import sha256_of_file
from lora_core.spectrum.derived_adapter import write_updates
from lora_core.spectrum.updates import Update, read_updates

Build = Callable[..., LlamaForCausalLM]
Make = Callable[..., Update]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SIDECAR = "adapter_identity.json"
LAYER = "model.layers.1.self_attn.q_proj"
KEY_A = f"base_model.model.{LAYER}.lora_A.weight"
KEY_B = f"base_model.model.{LAYER}.lora_B.weight"
# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def deltas_in_peft(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return ΔW of every layer as PEFT computes it from `folder`; its warnings are errors here."""
    model = PeftModel.from_pretrained(base, folder)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default")
    return found


def assert_read_by_peft(base: nn.Module, folder: Path, updates: dict[str, Update]) -> None:
    found = deltas_in_peft(base, folder)
    assert found.keys() == updates.keys()
    for name, update in updates.items():
        # s·r / r can differ from s in its last bit: one more rounding of 6e-8.
        expected = update.dense()
        tolerance = 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=tolerance)


def write_config(folder: Path, **values: Any) -> None:
    """Change values in the adapter's config."""
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **values}), encoding="utf-8")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def test_adapter_that_is_read_and_written_does_not_change(
    adapter_folder: Path, build_llama: Build, adapted: LlamaForCausalLM
) -> None:
    copy = adapter_folder.with_name("copy")
    model = build_llama()
    write_updates(copy, read_updates(adapter_folder), like=adapter_folder, derived_by="nothing")
    assert (copy / WEIGHTS).read_bytes() == (adapter_folder / WEIGHTS).read_bytes()
    assert (copy / CONFIG).read_bytes() == (adapter_folder / CONFIG).read_bytes()
    load_adapter(model, copy)
    for (_, found), (_, expected) in zip(lora_layers(model), lora_layers(adapted), strict=True):
        assert torch.equal(found.delta(), expected.delta())


def test_rank_stabilized_adapter_keeps_its_scale(
    build_llama: Build, randomize: Callable[[nn.Module], None], random_update: Make, tmp_path: Path
) -> None:
    model = build_llama()
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=("q_proj",))
    inject(model, config, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    updates = read_updates(tmp_path / "adapter")
    write_updates(tmp_path / "copy", updates, like=tmp_path / "adapter", derived_by="nothing")
    assert config_of(tmp_path / "copy")["use_rslora"] is False
    assert_read_by_peft(build_llama(), tmp_path / "copy", updates)
    copied = read_updates(tmp_path / "copy")
    assert copied[LAYER].scale == pytest.approx(5 / math.sqrt(3), rel=1e-15)


def test_peft_reads_layers_of_different_ranks_and_scales(
    build_llama: Build, adapter_folder: Path, random_update: Make
) -> None:
    """The file's default is that of the widest layer; the patterns list the others."""
    sizes = {"0.self_attn.q_proj": (64, 64, 2, 0.5), "0.mlp.down_proj": (64, 128, 6, 2.0)}
    sizes |= {"1.self_attn.q_proj": (64, 64, 2, 6.0), "1.mlp.down_proj": (64, 128, 6, 0.7)}
    updates = {}
    for name, (out, wide, rank, scale) in sizes.items():
        update = random_update(out, wide, rank, scale=scale, seed=len(name))
        updates[f"model.layers.{name}"] = update
    mixed = adapter_folder.with_name("mixed")
    write_updates(mixed, updates, like=adapter_folder, derived_by="made up")
    values = config_of(mixed)
    assert (values["r"], values["lora_alpha"]) == (6, 12)
    assert values["target_modules"] == ["down_proj", "q_proj"]
    assert values["rank_pattern"] == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 2,
    }
    assert values["alpha_pattern"] == {
        "model.layers.0.self_attn.q_proj": 1,
        "model.layers.1.mlp.down_proj": pytest.approx(4.2),
    }
    assert_read_by_peft(build_llama(), mixed, updates)


def test_layers_that_the_original_lacks_are_listed_by_full_path(
    build_llama: Build, adapter_folder: Path, random_update: Make
) -> None:
    updates = {
        "model.layers.0.mlp.up_proj": random_update(128, 64, 2),
        LAYER: random_update(64, 64, 2),
    }
    other = adapter_folder.with_name("other")
    write_updates(other, updates, like=adapter_folder, derived_by="made up")
    assert config_of(other)["target_modules"] == sorted(updates)
    assert_read_by_peft(build_llama(), other, updates)
    targets = load_adapter(build_llama(), other)
    assert [target.name for target in targets] == ["model.layers.0.mlp.up_proj", LAYER]


def test_exclusions_of_the_original_do_not_apply_to_new_layers(
    build_llama: Build, adapter_folder: Path, random_update: Make
) -> None:
    """A sum can update modules that the first adapter excludes."""
    (adapter_folder / SIDECAR).unlink()
    write_config(adapter_folder, exclude_modules=["up_proj"], layers_to_transform=[0, 1])
    updates = read_updates(adapter_folder)
    updates["model.layers.0.mlp.up_proj"] = random_update(128, 64, 4)
    other = adapter_folder.with_name("other")
    write_updates(other, updates, like=adapter_folder, derived_by="made up")
    assert {target.name for target in load_adapter(build_llama(), other)} == set(updates)
    assert_read_by_peft(build_llama(), other, updates)


def test_path_that_is_the_end_of_another_path_keeps_its_rank(
    adapter_folder: Path, random_update: Make
) -> None:
    """PEFT takes the first key that matches the end of a path: `proj` also matches `body.proj`."""

    def build() -> nn.Module:
        return nn.ModuleDict(
            {
                "proj": nn.Linear(8, 8),
                "body": nn.ModuleDict({"proj": nn.Linear(8, 8)}),
                "bodyxproj": nn.Linear(8, 8),
            }
        )

    updates = {
        "proj": random_update(8, 8, 1, scale=3.0),
        "body.proj": random_update(8, 8, 2, scale=0.5),
        "bodyxproj": random_update(8, 8, 4, scale=2.0),
    }
    mixed = adapter_folder.with_name("mixed")
    write_updates(mixed, updates, like=adapter_folder, derived_by="made up")
    write_config(mixed, task_type=None)
    assert_read_by_peft(build(), mixed, updates)


def test_factors_can_be_views_of_one_tensor(adapter_folder: Path) -> None:
    """safetensors writes neither strided tensors nor tensors that share memory."""
    shared = torch.randn(64, 64)
    view = Update(shared[:2], shared.T[:, :2], 1.0)
    updates = {f"model.layers.{i}.self_attn.q_proj": view for i in (0, 1)}
    views = adapter_folder.with_name("views")
    write_updates(views, updates, like=adapter_folder, derived_by="made up")
    for name, update in read_updates(views).items():
        assert torch.equal(update.dense(), updates[name].dense())


def test_sidecar_is_copied_with_a_lineage(
    adapted: LlamaForCausalLM, small_config: LoraConfig, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    second = tmp_path / "second"
    identity = Identity(base="hub/name", revision="abc", lineage={"data": "d"})
    save_adapter(adapted, first, small_config, identity)
    updates = {name: update.folded() for name, update in read_updates(first).items()}
    sha256 = write_updates(second, updates, like=first, derived_by="scale folded")
    before = read_identity(first)
    after = read_identity(second)
    assert before is not None
    assert after is not None
    for key in ("base", "revision", "base_digests"):
        assert after[key] == before[key]
    assert after["lineage"] == {
        "data": "d",
        "derived_by": "scale folded",
        "derived_from": before["adapter_sha256"],
    }
    assert after["adapter_sha256"] == sha256 == sha256_of_file(second / WEIGHTS)
    assert before["adapter_sha256"] != sha256
    digests = after["tensor_sha256"]
    digests_before = before["tensor_sha256"]
    assert digests.keys() == digests_before.keys()
    assert digests[KEY_A] == digests_before[KEY_A]
    assert digests[KEY_B] != digests_before[KEY_B]


def test_lineage_lists_all_parents(adapter_folder: Path, random_update: Make) -> None:
    other = adapter_folder.with_name("other")
    updates = {LAYER: random_update(64, 64, 2)}
    write_updates(other, updates, like=adapter_folder, derived_by="made up")
    child = adapter_folder.with_name("child")
    write_updates(
        child,
        read_updates(adapter_folder),
        like=adapter_folder,
        derived_by="a sum",
        parents=[adapter_folder, other],
    )
    identity = read_identity(child)
    assert identity is not None
    digests = [sha256_of_file(folder / WEIGHTS) for folder in (adapter_folder, other)]
    assert identity["lineage"]["derived_from"] == ", ".join(digests)


def test_no_sidecar_is_written_if_the_original_has_none(
    adapter_folder: Path, build_llama: Build
) -> None:
    """A sidecar without a base would be refused on every base."""
    (adapter_folder / SIDECAR).unlink()
    copy = adapter_folder.with_name("copy")
    write_updates(copy, read_updates(adapter_folder), like=adapter_folder, derived_by="nothing")
    assert not (copy / SIDECAR).exists()
    load_adapter(build_llama(), copy)


def test_folder_can_be_replaced_in_place(adapter_folder: Path) -> None:
    before = read_updates(adapter_folder)
    folded = {name: update.folded() for name, update in before.items()}
    write_updates(adapter_folder, folded, like=adapter_folder, derived_by="scale folded")
    for name, update in read_updates(adapter_folder).items():
        torch.testing.assert_close(update.dense(), before[name].dense(), rtol=1e-6, atol=1e-6)


def test_invalid_updates_are_not_written(adapter_folder: Path, random_update: Make) -> None:
    invalid = random_update(64, 64, 2)
    invalid.a[0, 0] = math.nan
    before = {path.name: path.read_bytes() for path in adapter_folder.iterdir()}
    with pytest.raises(AdapterError, match="not finite"):
        write_updates(adapter_folder, {LAYER: invalid}, like=adapter_folder, derived_by="invalid")
    with pytest.raises(AdapterError, match="no update"):
        write_updates(adapter_folder, {}, like=adapter_folder, derived_by="emptied")
    assert {path.name: path.read_bytes() for path in adapter_folder.iterdir()} == before
    assert [path.name for path in adapter_folder.parent.iterdir()] == [adapter_folder.name]
