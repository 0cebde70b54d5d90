"""Adapters from before transformers renamed a model's modules are read, and so are later ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lora_core import (
    AdapterError,
    Identity,
    LoraConfig,
    LoraError,
    MergeError,
    count_intruders,
    inject,
    load_adapter,
    merge,
    merge_checkpoint,
    save_adapter,
)
from lora_core.export.conversion import ConversionOptions, convert_adapter
from lora_core.inspection.adapter_verification import verify_adapter
from lora_core.spectrum.updates import read_updates
from pipelines.models.renames import checkpoint_renames, weight_renames

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = torch.arange(3, 9)[None]


def vit() -> PreTrainedModel:
    config = ViTConfig(**SIZES, num_hidden_layers=2, image_size=8, patch_size=4, num_labels=3)
    return ViTForImageClassification(config)


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, vocab_size=40, num_hidden_layers=1))


def qwen2_vl() -> PreTrainedModel:
    text = {**SIZES, "vocab_size": 40, "num_hidden_layers": 1, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    return Qwen2VLForConditionalGeneration(config)


def pixels(model: PreTrainedModel) -> Tensor:
    images = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    return model(pixel_values=images).logits  # type: ignore[no-any-return]


def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


CASES: dict[str, tuple[Any, ...]] = {
    # model, its output, settings now, settings of the file before the change, names before it
    "ViT": (
        vit,
        pixels,
        {
            "target_modules": ("q_proj", "fc1"),
            "rank_pattern": {"fc1": 3},
            "alpha_pattern": {r"1\.attention\.q_proj": 5},
            "modules_to_save": ("classifier",),
        },
        {
            "target_modules": ["query", "intermediate.dense"],
            "rank_pattern": {"intermediate.dense": 3},
            "alpha_pattern": {r"1\.attention\.attention\.query": 5},
            "modules_to_save": ["classifier"],
        },
        {
            r"vit\.layers": "vit.encoder.layer",
            r"attention\.q_proj": "attention.attention.query",
            r"mlp\.fc1": "intermediate.dense",
        },
    ),
    "GPT-NeoX": (
        neox,
        logits,
        {"target_modules": ("query_key_value", "lm_head")},
        {"target_modules": ["query_key_value", "embed_out"]},
        {"lm_head": "embed_out"},
    ),
    "Qwen2-VL": (
        qwen2_vl,
        logits,
        {"target_modules": r"model\.language_model\..*(q_proj|up_proj)"},
        {"target_modules": r"model\..*(q_proj|up_proj)"},
        {r"model\.language_model": "model"},
    ),
}


def seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return build().eval()


def former_file(folder: Path, settings: dict[str, Any], names: dict[str, str]) -> None:
    """Rewrite an adapter as it was before the change, without this library's sidecar."""
    (folder / "adapter_identity.json").unlink()
    weights = folder / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in load_file(weights).items():
        for new, old in names.items():
            key = re.sub(new, old, key)
        tensors[key] = tensor
    save_file(tensors, weights, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, **settings}))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_adapter_with_former_names_is_loaded(case: tuple[Any, ...], tmp_path: Path) -> None:
    build, call, settings, former_settings, names = case
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, **settings})
    model = seeded(build)
    targets = inject(model, config, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    expected = call(model)
    save_adapter(model, tmp_path, config, Identity())
    present = seeded(build)
    load_adapter(present, tmp_path, renames=weight_renames(present))
    assert torch.equal(call(present), expected)
    former_file(tmp_path, former_settings, names)
    with pytest.raises(LoraError):
        load_adapter(seeded(build), tmp_path)
    loaded = seeded(build)
    renames = weight_renames(loaded)
    assert load_adapter(loaded, tmp_path, renames=renames) == targets
    assert torch.equal(call(loaded), expected)


def test_missing_module_under_a_former_name_is_refused(tmp_path: Path) -> None:
    build, _, settings, former_settings, names = CASES["ViT"]
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, **settings})
    model = seeded(build)
    inject(model, config, seed=0)
    save_adapter(model, tmp_path, config, Identity())
    former_file(tmp_path, former_settings, names)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    kept = {key: value for key, value in tensors.items() if ".layer.1.intermediate" not in key}
    assert len(kept) == len(tensors) - 2
    save_file(kept, weights, metadata={"format": "pt"})
    loaded = seeded(build)
    with pytest.raises(AdapterError, match=r"2 missing, such as .*vit\.layers\.1\.mlp\.fc1"):
        load_adapter(loaded, tmp_path, renames=weight_renames(loaded))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_renames_of_present_names_lead_back(case: tuple[Any, ...]) -> None:
    model = case[0]()
    present, former = weight_renames(model)
    for name in model.state_dict():
        assert present(former(name)) == name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("is_former", [False, True], ids=["present names", "former names"])
def test_merge_on_disk_is_the_merge_in_memory(
    case: tuple[Any, ...], is_former: bool, tmp_path: Path
) -> None:
    """The files of a base have former names."""
    build, call, settings, former_settings, names = case
    settings = {name: value for name, value in settings.items() if name != "modules_to_save"}
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    seeded(build).save_pretrained(base)
    model = type(seeded(build)).from_pretrained(base).eval()
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, **settings})
    inject(model, config, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    save_adapter(model, adapter, config, Identity())
    if is_former:
        former_file(adapter, {**former_settings, "modules_to_save": None}, names)
    merge(model)
    report = merge_checkpoint(base, adapter, tmp_path / "merged", renames=checkpoint_renames(base))
    assert report.retention.keys() and report.files == ("model.safetensors",)
    found = type(model).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(call(found), call(model))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_adapter_is_verified_and_measured_on_renamed_files(
    case: tuple[Any, ...], tmp_path: Path
) -> None:
    """The files of the base have former names, and those of the adapter present ones."""
    build, _, settings, _, _ = case
    settings = {name: value for name, value in settings.items() if name != "modules_to_save"}
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    seeded(build).save_pretrained(base)
    model = type(seeded(build)).from_pretrained(base)
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "use_dora": True, **settings})
    inject(model, config, seed=0)
    save_adapter(model, adapter, config, Identity())
    (adapter / "adapter_identity.json").unlink()
    renames = checkpoint_renames(base)
    verified = verify_adapter(adapter, base, renames)
    assert "adapted weights of the right shapes" in verified.base
    counts = count_intruders(adapter, base, renames=renames)
    assert counts
    options = ConversionOptions(base=base, base_renames=renames)
    converted = convert_adapter(adapter, tmp_path / "plain", "lora", options)
    assert read_updates(tmp_path / "plain").keys() == counts.keys()
    assert any("approximat" in change for change in converted.changes)


def test_merge_without_renames_states_what_is_missing(tmp_path: Path) -> None:
    build, _, _, _, _ = CASES["ViT"]
    model = seeded(build)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",))
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    with pytest.raises(MergeError, match=r"vit\.layers\.0\..*former names .* no renames are given"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_model_that_transformers_does_not_have_has_no_renames(tmp_path: Path) -> None:
    seeded(CASES["ViT"][0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"]}))
    assert checkpoint_renames(tmp_path) == ()
