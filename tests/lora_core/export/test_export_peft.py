"""The unchanged and the merged export, read back by PEFT and transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_core import AdapterError
from lora_core.errors import ExportError
from lora_core.export.export import export_gguf, export_merged, export_peft, export_vllm

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
Files = Callable[[Path], dict[str, bytes]]
MakePeft = Callable[..., PeftModel]
Refused = Callable[..., None]
# PEFT 0.21 uses a name that transformers renames in version 6; this does not concern the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
    "alpha_pattern": {"layers.0.self_attn.k_proj": 1, "v_proj": 24},
}


def test_the_peft_export_is_the_adapter_byte_for_byte(
    adapter_folder: Path, result: Path, files: Files
) -> None:
    sha256 = export_peft(adapter_folder, result)
    assert files(result) == files(adapter_folder)
    identity = json.loads((result / "adapter_identity.json").read_text(encoding="utf-8"))
    assert identity["adapter_sha256"] == sha256


def test_patterns_survive_the_peft_export(
    peft_model: MakePeft,
    build_llama: Build,
    logits: Logits,
    adapter: Path,
    result: Path,
) -> None:
    theirs = peft_model(**PATTERNS)
    export_peft(adapter, result)
    loaded = PeftModel.from_pretrained(build_llama(), result).eval()
    assert torch.equal(logits(loaded), logits(theirs))


def test_a_damaged_adapter_is_not_exported(
    adapter_folder: Path, result: Path, refused: Refused
) -> None:
    path = adapter_folder / "adapter_model.safetensors"
    (adapter_folder / "adapter_identity.json").unlink()  # PEFT's own adapters have none
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    removed = tensors.pop(key)
    save_file(tensors, path)
    module = "model.layers.1.self_attn.q_proj"
    refused(lambda: export_peft(adapter_folder, result), AdapterError, module)
    save_file({**tensors, key: torch.full_like(removed, torch.nan)}, path)
    refused(lambda: export_peft(adapter_folder, result), AdapterError, "not finite")


@pytest.mark.parametrize("where", ["adapter", "adapter/inside", "."])
@pytest.mark.parametrize("kind", ["peft", "vllm", "gguf"])
def test_a_destination_over_the_adapter_is_refused(
    adapter_folder: Path,
    tmp_path: Path,
    llama_config: Path,
    refused: Refused,
    kind: str,
    where: str,
) -> None:
    """The export would replace the folder with everything in it."""
    exports: dict[str, Callable[[], object]] = {
        "peft": lambda: export_peft(adapter_folder, tmp_path / where),
        "vllm": lambda: export_vllm(adapter_folder, tmp_path / where, max_rank=8),
        "gguf": lambda: export_gguf(adapter_folder, tmp_path / where, base_config=llama_config),
    }
    refused(exports[kind], ExportError, "overlaps")


def test_a_replaced_weights_file_is_not_exported(
    adapter_folder: Path, result: Path, refused: Refused
) -> None:
    path = adapter_folder / "adapter_model.safetensors"
    doubled = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(doubled, path)
    refused(lambda: export_peft(adapter_folder, result), AdapterError, "its sidecar records")


def test_the_merged_model_computes_the_same_in_transformers(
    peft_model: MakePeft,
    logits: Logits,
    llama_folder: Path,
    adapter: Path,
    result: Path,
    settings: dict[str, Any],
) -> None:
    peft_model(**settings)
    base = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    plain = logits(base)
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    export_merged(llama_folder, adapter, result)
    loaded = AutoModelForCausalLM.from_pretrained(result).eval()
    expected = logits(theirs)
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=atol)
    assert (logits(loaded) - plain).abs().max() > 0.1
