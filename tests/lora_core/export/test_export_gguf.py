"""The GGUF export, read back with gguf's reader and transformers."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from parity.readers import gguf_objections, gguf_updates, read_gguf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lora_core.errors import CheckpointError, ExportError
from lora_core.export.export import export_gguf

Build = Callable[..., LlamaForCausalLM]
Deltas = Callable[[PeftModel], dict[str, Tensor]]
MakePeft = Callable[..., PeftModel]
Refused = Callable[..., None]
# PEFT 0.21 uses a name that transformers renames in version 6; this does not concern the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def edit_config(source: Path, target: Path, **changes: Any) -> None:
    """Write a copy of the base's config.json with changes."""
    values = json.loads(source.read_text(encoding="utf-8"))
    target.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def test_the_gguf_contains_every_update(
    peft_model: MakePeft,
    build_llama: Build,
    deltas: Deltas,
    tmp_path: Path,
    llama_config: Path,
    settings: dict[str, Any],
) -> None:
    """llama.cpp applies alpha / (rank of the tensor) · B A and reorders 4 q heads and 2 k heads."""
    expected = deltas(peft_model(**settings))
    export_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", base_config=llama_config)
    assert gguf_objections(tmp_path / "adapter.gguf", build_llama()) == []
    found = gguf_updates(tmp_path / "adapter.gguf", heads=4, key_heads=2)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("module", "name"), [("q_proj", "attn_q"), ("k_proj", "attn_k")])
def test_transformers_restores_the_original_row_order(
    peft_model: MakePeft,
    adapter: Path,
    tmp_path: Path,
    llama_config: Path,
    module: str,
    name: str,
) -> None:
    """transformers reverses the order when it loads a GGUF model: PEFT's B returns bit for bit."""
    model = peft_model()
    export_gguf(adapter, tmp_path / "adapter.gguf", base_config=llama_config)
    stored = read_gguf(tmp_path / "adapter.gguf")[1][f"blk.1.{name}.weight.lora_b"]
    processor = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    layer = getattr(model.base_model.model.model.layers[1].self_attn, module)
    expected = layer.lora_B["default"].weight.detach()
    assert not np.array_equal(stored, expected)
    processed = processor.process(stored, f"blk.1.{name}.weight")
    assert np.array_equal(processed.weights, expected)


def test_the_gguf_has_the_shapes_that_llama_cpp_checks(
    peft_model: MakePeft, adapter: Path, tmp_path: Path, llama_config: Path
) -> None:
    """GGUF lists the innermost dimension first: A is (in, r) and B (r, out)."""
    peft_model(target_modules=["down_proj"])
    export_gguf(adapter, tmp_path / "adapter.gguf", base_config=llama_config.parent)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.lora_a"] == [128, 4]
    assert shapes["blk.0.ffn_down.weight.lora_b"] == [4, 64]


def test_qwen_keeps_its_row_order(
    peft_model: MakePeft, adapter: Path, tmp_path: Path, llama_config: Path
) -> None:
    model = peft_model(target_modules=["q_proj"])
    edit_config(llama_config, tmp_path / "config.json", model_type="qwen2")
    export_gguf(adapter, tmp_path / "adapter.gguf", base_config=tmp_path, architecture="qwen2")
    fields, tensors = read_gguf(tmp_path / "adapter.gguf")
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    expected = layer.lora_B["default"].weight.detach()
    assert fields["general.architecture"] == "qwen2"
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"], expected)


def test_a_previous_gguf_is_replaced_and_repeated_exports_have_the_same_bytes(
    adapter_folder: Path, result: Path, llama_config: Path
) -> None:
    result.write_text("old", encoding="utf-8")
    sha256 = export_gguf(adapter_folder, result, base_config=llama_config)
    before = result.read_bytes()
    assert export_gguf(adapter_folder, result, base_config=llama_config) == sha256
    assert result.read_bytes() == before
    assert list(result.parent.glob(".*")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gpt2"}, "architecture='gpt2' is not supported"),
        ({"architecture": "qwen2"}, "model_type 'llama', which llama.cpp does not store as qwen2"),
    ],
    ids=str,
)
def test_another_architecture_is_refused(
    adapter_folder: Path,
    result: Path,
    llama_config: Path,
    refused: Refused,
    options: dict[str, str],
    message: str,
) -> None:
    refused(
        lambda: export_gguf(adapter_folder, result, base_config=llama_config, **options),
        ExportError,
        message,
    )


def test_a_missing_base_config_is_refused(
    adapter_folder: Path, tmp_path: Path, result: Path, refused: Refused
) -> None:
    refused(
        lambda: export_gguf(adapter_folder, result, base_config=tmp_path / "none"),
        CheckpointError,
        "is missing",
    )


def test_a_base_config_without_sizes_is_refused(
    adapter_folder: Path, tmp_path: Path, result: Path, refused: Refused
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    refused(
        lambda: export_gguf(adapter_folder, result, base_config=tmp_path),
        CheckpointError,
        "has no vocab_size",
    )


def test_a_target_unknown_to_llama_cpp_is_refused(
    adapter_folder: Path, result: Path, llama_config: Path, refused: Refused
) -> None:
    path = adapter_folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace("q_proj", "extra_proj"): tensors[key] for key in tensors}, path)
    (adapter_folder / "adapter_identity.json").unlink()
    message = "llama has no tensor for model.layers.0.self_attn.extra_proj"
    export = partial(export_gguf, adapter_folder, result, base_config=llama_config)
    refused(export, ExportError, message)


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": 4}, {"hidden_size": 128}, {"head_dim": 32}], ids=str
)
def test_a_base_of_other_shapes_is_refused(
    peft_model: MakePeft,
    adapter: Path,
    tmp_path: Path,
    llama_config: Path,
    refused: Refused,
    change: dict[str, int],
) -> None:
    """With another number of heads, the rows would silently get a wrong order."""
    peft_model(target_modules=["k_proj"])
    edit_config(llama_config, tmp_path / "config.json", **change)
    refused(
        lambda: export_gguf(adapter, tmp_path / "result", base_config=tmp_path),
        ExportError,
        r"k_proj is \(32, 64\), but this base has",
    )


def test_a_tied_head_has_no_tensor_in_gguf(
    peft_model: MakePeft,
    adapter: Path,
    tmp_path: Path,
    result: Path,
    llama_config: Path,
    refused: Refused,
) -> None:
    peft_model(target_modules=["lm_head"])
    edit_config(llama_config, tmp_path / "config.json", tie_word_embeddings=True)
    refused(
        lambda: export_gguf(adapter, result, base_config=tmp_path),
        ExportError,
        "lm_head is tied to the embedding",
    )
    export_gguf(adapter, tmp_path / "untied.gguf", base_config=llama_config)
    assert "output.weight.lora_a" in read_gguf(tmp_path / "untied.gguf")[1]
