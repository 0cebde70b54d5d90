"""A report shows what PEFT and this library wrote."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft_adapters import TARGETS, save_peft_adapter
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_core import (
    Identity,
    LoraConfig,
    fingerprint,
    inject,
    inspect_adapter,
    save_adapter,
)

# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def test_groups_have_the_ranks_scales_and_norms_that_peft_computes(
    llama_folder: Path, tmp_path: Path
) -> None:
    settings = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 4}}
    folder = save_peft_adapter(llama_folder, tmp_path / "adapter", use_rslora=True, **settings)
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    theirs = PeftModel.from_pretrained(base, folder)
    report = inspect_adapter(folder)
    assert report.type == "rsLoRA"
    assert {group.kind for group in report.groups} == set(TARGETS) == set(report.targets)
    for group in report.groups:
        layers = [
            module
            for name, module in theirs.named_modules()
            if name.endswith(group.kind) and hasattr(module, "get_delta_weight")
        ]
        assert group.modules == len(layers) == 2
        first = layers[0]
        assert group.rank == first.r["default"]
        assert group.scale == pytest.approx(first.scaling["default"])
        norms = [float(layer.get_delta_weight("default").norm()) for layer in layers]
        assert group.mean_norm == pytest.approx(sum(norms) / 2, rel=1e-5)
        assert group.shape == tuple(first.get_delta_weight("default").shape)


def test_a_plain_adapter_has_its_size_and_nothing_unusual(plain: Path, llama_folder: Path) -> None:
    report = inspect_adapter(plain)
    assert (report.type, report.base) == ("LoRA", str(llama_folder))
    assert report.quantization == "" and report.fingerprints == {}
    # Two layers: q 64→64, v 64→32, down 128→64, each of rank 4.
    assert report.weights == 2 * 4 * (128 + 96 + 192)
    assert report.file_bytes == (plain / "adapter_model.safetensors").stat().st_size
    assert report.anomalies == ()


def test_the_sidecar_has_base_revision_fingerprint_and_quantization(
    adapted: LlamaForCausalLM, small_config: LoraConfig, tmp_path: Path
) -> None:
    identity = Identity("tiny", "abc123", lineage={"quantization": "nf4"})
    save_adapter(adapted, tmp_path / "ours", small_config, identity)
    report = inspect_adapter(tmp_path / "ours")
    assert (report.base, report.revision, report.quantization) == ("tiny", "abc123", "nf4")
    kind, digest = fingerprint(adapted)
    assert report.fingerprints[kind] == digest
    assert report.anomalies == ()


def test_dora_is_named_and_its_magnitudes_are_counted(dora: Path) -> None:
    report = inspect_adapter(dora)
    assert report.type == "DoRA"
    assert report.others == {"lora_magnitude_vector": 6}
    assert [anomaly.kind for anomaly in report.anomalies] == ["vllm"]


def test_update_of_a_grouped_convolution_is_measured_and_no_misfit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("0",))
    inject(model, config, seed=0)
    nn.init.normal_(model[0].lora_B)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    report = inspect_adapter(tmp_path / "adapter")
    [group] = report.groups
    assert not [one for one in report.anomalies if one.is_damage]
    assert (group.rank, group.shape) == (4, (6, 36))
    assert group.mean_norm == pytest.approx(float(model[0].delta().norm()), rel=1e-5)
