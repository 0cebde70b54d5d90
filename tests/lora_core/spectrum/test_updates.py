"""Updates read from a folder are those of the model that was saved, and those written are what PEFT computes with."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    BaseMismatchError,
    Identity,
    LoraConfig,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lora_core.adapter.adapter_files import read_identity
from lora_core.files import sha256_of_file
from lora_core.spectrum.updates import Update, read_over_one_base, read_updates, write_updates

Build = Callable[..., LlamaForCausalLM]
Make = Callable[..., Update]
WEIGHTS, CONFIG, SIDECAR = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "adapter_identity.json",
)
LAYER = "model.layers.1.self_attn.q_proj"
KEY = f"base_model.model.{LAYER}.lora_A.weight"
# PEFT 0.21 asks transformers 5.23 under a name that transformers renames in 6; nothing about the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def deltas_in_peft(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return ΔW of every layer as PEFT computes it from `folder`; its warnings are errors here."""
    model = PeftModel.from_pretrained(base, folder)
    layers = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return {name: module.get_delta_weight("default") for name, module in layers.items()}


def assert_read_by_peft(base: nn.Module, folder: Path, updates: dict[str, Update]) -> None:
    found = deltas_in_peft(base, folder)
    assert found.keys() == updates.keys()
    for name, update in updates.items():
        # alpha = s·r divided by r again may differ from s in its last bit: one more rounding of 6e-8.
        torch.testing.assert_close(
            found[name], update.dense(), rtol=1e-6, atol=1e-6 * update.dense().abs().max().item()
        )


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and drop the sidecar, so that not its digest is what refuses the folder."""
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


def test_a_folded_update_is_the_same_with_a_scale_of_one(random_update: Make) -> None:
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
def test_a_scale_that_no_config_could_give_is_refused(scale: float) -> None:
    with pytest.raises(AdapterError, match="put a sign or a zero into B"):
        Update(torch.zeros(2, 7), torch.zeros(5, 2), scale)


# --- reading ---


@pytest.mark.parametrize("rslora", [False, True])
def test_updates_are_those_of_the_model_bit_for_bit(
    build_llama: Build, randomize: Callable[[nn.Module], None], tmp_path: Path, rslora: bool
) -> None:
    model, config = build_llama(), LoraConfig(r=3, lora_alpha=5, use_rslora=rslora)
    inject(model, config, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    updates = read_updates(tmp_path / "adapter")
    assert list(updates) == sorted(name for name, _ in lora_layers(model))
    for name, layer in lora_layers(model):
        assert torch.equal(updates[name].dense(), layer.delta())


def test_an_adapter_stored_in_bfloat16_is_read_in_float32(adapter_folder: Path) -> None:
    spoil(
        adapter_folder,
        lambda tensors: tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()}),
    )
    assert all(
        factor.dtype == torch.float32
        for update in read_updates(adapter_folder).values()
        for factor in (update.a, update.b)
    )


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "half a pair": (lambda tensors: tensors.pop(KEY), f"lora_B of {LAYER} alone"),
    "magnitude": (
        lambda tensors: tensors.update(
            {KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}
        ),
        "magnitude_vec",
    ),
    "embedding": (
        lambda tensors: tensors.update(
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}
        ),
        "embedding_A",
    ),
    "full weight": (
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(9, 4)}),
        "lm_head.weight",
    ),
    "rank": (
        lambda tensors: tensors.update({KEY.replace("_A", "_B"): torch.ones(64, 3)}),
        rf"{LAYER} of .*B of \(64, 3\)",
    ),
    "kernel": (
        lambda tensors: tensors.update({KEY: torch.ones(4, 64, 1)}),
        "not the factors of one weight",
    ),
    "nan": (lambda tensors: tensors[KEY].fill_(math.nan), "not finite"),
    "nothing": (lambda tensors: tensors.clear(), "holds no tensor"),
}


@pytest.mark.parametrize(("change", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_what_is_no_pure_low_rank_adapter_is_refused(
    adapter_folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    spoil(adapter_folder, change)
    with pytest.raises(AdapterError, match=message):
        read_updates(adapter_folder)


def test_a_rank_other_than_the_config_says_is_refused(adapter_folder: Path) -> None:
    """Its scale, alpha over the config's rank, would be another adapter's."""

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors[KEY] = tensors[KEY][:2].clone()
        tensors[KEY.replace("_A", "_B")] = tensors[KEY.replace("_A", "_B")][:, :2].clone()

    spoil(adapter_folder, halve)
    with pytest.raises(AdapterError, match="rank is 2, but the config gives 4"):
        read_updates(adapter_folder)


def test_a_file_that_its_sidecar_does_not_know_is_refused(adapter_folder: Path) -> None:
    tensors = load_file(adapter_folder / WEIGHTS)
    save_file(
        {key: 2 * tensor for key, tensor in tensors.items()},
        adapter_folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    with pytest.raises(AdapterError, match="sidecar records"):
        read_updates(adapter_folder)


def test_stacks_of_experts_are_refused_by_their_name(adapter_folder: Path) -> None:
    """Their factors look like those of a linear layer, of as many ranks as all experts have together."""
    (adapter_folder / SIDECAR).unlink()
    values = {**config_of(adapter_folder), "target_parameters": ["experts.down_proj"]}
    (adapter_folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"updates stacks of experts \(experts.down_proj\)"):
        read_updates(adapter_folder)


# --- several adapters ---


@pytest.fixture
def folder_of(random_update: Make, adapter_folder: Path) -> Callable[..., Path]:
    """Return a maker of folders beside `adapter_folder` whose sidecar says what is given."""

    def make(name: str, **sidecar: object) -> Path:
        folder = adapter_folder.with_name(name)
        write_updates(
            folder, {LAYER: random_update(64, 64, 2)}, like=adapter_folder, derived_by="made up"
        )
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


# --- writing ---


def test_an_adapter_read_and_written_is_the_same_adapter(
    adapter_folder: Path, build_llama: Build, adapted: LlamaForCausalLM
) -> None:
    copy, model = adapter_folder.with_name("copy"), build_llama()
    write_updates(copy, read_updates(adapter_folder), like=adapter_folder, derived_by="nothing")
    assert (copy / WEIGHTS).read_bytes() == (adapter_folder / WEIGHTS).read_bytes()
    assert (copy / CONFIG).read_bytes() == (adapter_folder / CONFIG).read_bytes()
    load_adapter(model, copy)
    for (_, found), (_, expected) in zip(lora_layers(model), lora_layers(adapted), strict=True):
        assert torch.equal(found.delta(), expected.delta())


def test_a_rank_stabilised_adapter_keeps_its_scale(
    build_llama: Build, randomize: Callable[[nn.Module], None], random_update: Make, tmp_path: Path
) -> None:
    model, config = (
        build_llama(),
        LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=("q_proj",)),
    )
    inject(model, config, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    updates = read_updates(tmp_path / "adapter")
    write_updates(tmp_path / "copy", updates, like=tmp_path / "adapter", derived_by="nothing")
    assert config_of(tmp_path / "copy")["use_rslora"] is False
    assert_read_by_peft(build_llama(), tmp_path / "copy", updates)
    again = read_updates(tmp_path / "copy")
    assert again[LAYER].scale == pytest.approx(5 / math.sqrt(3), rel=1e-15)


def test_peft_reads_layers_of_different_ranks_and_scales(
    build_llama: Build, adapter_folder: Path, random_update: Make
) -> None:
    """The default of the file is the widest layer's; the others stand in its patterns."""
    sizes = {"0.self_attn.q_proj": (64, 64, 2, 0.5), "0.mlp.down_proj": (64, 128, 6, 2.0)}
    sizes |= {"1.self_attn.q_proj": (64, 64, 2, 6.0), "1.mlp.down_proj": (64, 128, 6, 0.7)}
    updates = {
        f"model.layers.{name}": random_update(out, wide, rank, scale=scale, seed=len(name))
        for name, (out, wide, rank, scale) in sizes.items()
    }
    mixed = adapter_folder.with_name("mixed")
    write_updates(mixed, updates, like=adapter_folder, derived_by="made up")
    values = config_of(mixed)
    assert (values["r"], values["lora_alpha"], values["target_modules"]) == (
        6,
        12,
        ["down_proj", "q_proj"],
    )
    assert values["rank_pattern"] == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 2,
    }
    assert values["alpha_pattern"] == {
        "model.layers.0.self_attn.q_proj": 1,
        "model.layers.1.mlp.down_proj": pytest.approx(4.2),
    }
    assert_read_by_peft(build_llama(), mixed, updates)


def test_layers_that_the_original_lacks_are_named_in_full(
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


def test_what_left_modules_out_of_the_original_leaves_none_out_of_the_new(
    build_llama: Build, adapter_folder: Path, random_update: Make
) -> None:
    """A sum may update modules that the first adapter was told to exclude."""
    (adapter_folder / SIDECAR).unlink()
    narrowed = {
        **config_of(adapter_folder),
        "exclude_modules": ["up_proj"],
        "layers_to_transform": [0, 1],
    }
    (adapter_folder / CONFIG).write_text(json.dumps(narrowed), encoding="utf-8")
    updates = {
        **read_updates(adapter_folder),
        "model.layers.0.mlp.up_proj": random_update(128, 64, 4),
    }
    other = adapter_folder.with_name("other")
    write_updates(other, updates, like=adapter_folder, derived_by="made up")
    assert {target.name for target in load_adapter(build_llama(), other)} == set(updates)
    assert_read_by_peft(build_llama(), other, updates)


def test_a_path_that_ends_another_path_keeps_its_own_rank(
    adapter_folder: Path, random_update: Make
) -> None:
    """PEFT takes the first key that matches the end of a path: `proj` would match `body.proj` as well."""

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
    values = {**config_of(mixed), "task_type": None}
    (mixed / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    assert_read_by_peft(build(), mixed, updates)


def test_factors_may_be_views_of_one_tensor(adapter_folder: Path) -> None:
    """safetensors writes neither strided tensors nor two that share memory."""
    shared = torch.randn(64, 64)
    updates = {
        f"model.layers.{i}.self_attn.q_proj": Update(shared[:2], shared.T[:, :2], 1.0)
        for i in (0, 1)
    }
    views = adapter_folder.with_name("views")
    write_updates(views, updates, like=adapter_folder, derived_by="made up")
    for name, update in read_updates(views).items():
        assert torch.equal(update.dense(), updates[name].dense())


def test_the_sidecar_is_carried_over_with_what_was_done(
    adapted: LlamaForCausalLM, small_config: LoraConfig, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_adapter(
        adapted,
        first,
        small_config,
        Identity(base="hub/name", revision="abc", lineage={"data": "d"}),
    )
    updates = {name: update.folded() for name, update in read_updates(first).items()}
    sha256 = write_updates(second, updates, like=first, derived_by="scale folded")
    before, after = read_identity(first), read_identity(second)
    assert before is not None
    assert after is not None
    assert {key: after[key] for key in ("base", "revision", "base_digests")} == {
        key: before[key] for key in ("base", "revision", "base_digests")
    }
    assert after["lineage"] == {
        "data": "d",
        "derived_by": "scale folded",
        "derived_from": before["adapter_sha256"],
    }
    assert (
        after["adapter_sha256"]
        == sha256
        == sha256_of_file(second / WEIGHTS)
        != before["adapter_sha256"]
    )
    assert after["tensor_sha256"].keys() == before["tensor_sha256"].keys()
    assert after["tensor_sha256"][KEY] == before["tensor_sha256"][KEY]
    assert (
        after["tensor_sha256"][KEY.replace("_A", "_B")]
        != before["tensor_sha256"][KEY.replace("_A", "_B")]
    )


def test_all_parents_are_named(adapter_folder: Path, folder_of: Callable[..., Path]) -> None:
    other, child = folder_of("other"), adapter_folder.with_name("child")
    write_updates(
        child,
        read_updates(adapter_folder),
        like=adapter_folder,
        derived_by="a sum",
        parents=[adapter_folder, other],
    )
    identity = read_identity(child)
    assert identity is not None
    assert (
        identity["lineage"]["derived_from"]
        == f"{sha256_of_file(adapter_folder / WEIGHTS)}, {sha256_of_file(other / WEIGHTS)}"
    )


def test_without_a_sidecar_none_is_written(adapter_folder: Path, build_llama: Build) -> None:
    """One that names no base would be refused on every base."""
    (adapter_folder / SIDECAR).unlink()
    copy = adapter_folder.with_name("copy")
    write_updates(copy, read_updates(adapter_folder), like=adapter_folder, derived_by="nothing")
    assert not (copy / SIDECAR).exists()
    load_adapter(build_llama(), copy)


def test_a_folder_may_take_its_own_place(adapter_folder: Path) -> None:
    before = read_updates(adapter_folder)
    write_updates(
        adapter_folder,
        {name: before[name].folded() for name in before},
        like=adapter_folder,
        derived_by="scale folded",
    )
    for name, update in read_updates(adapter_folder).items():
        torch.testing.assert_close(update.dense(), before[name].dense(), rtol=1e-6, atol=1e-6)


def test_updates_that_cannot_be_used_are_not_written(
    adapter_folder: Path, random_update: Make
) -> None:
    spoilt = random_update(64, 64, 2)
    spoilt.a[0, 0] = math.nan
    before = {path.name: path.read_bytes() for path in adapter_folder.iterdir()}
    with pytest.raises(AdapterError, match="not finite"):
        write_updates(adapter_folder, {LAYER: spoilt}, like=adapter_folder, derived_by="spoilt")
    with pytest.raises(AdapterError, match="no update"):
        write_updates(adapter_folder, {}, like=adapter_folder, derived_by="emptied")
    assert {path.name: path.read_bytes() for path in adapter_folder.iterdir()} == before
    assert [path.name for path in adapter_folder.parent.iterdir()] == [adapter_folder.name]
