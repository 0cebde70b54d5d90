"""Every export is read back by somebody else: PEFT, transformers, gguf's reader; and they find the same update."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from parity.readers import (
    adapter_values,
    gguf_objections,
    gguf_updates,
    read_gguf,
    vllm_objections,
    vllm_updates,
)
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lora_core import AdapterError, load_adapter
from lora_core.errors import CheckpointError, ExportError, LoraError
from lora_core.export.export import VLLM_RANKS, export_gguf, export_merged, export_peft, export_vllm

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "odd rank": {"r": 6},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 1, "v_proj": 24},
    },
    "patterns, rslora": {
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
# PEFT 0.21 asks transformers 5.23 under a name that transformers renames in 6; nothing about the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
# Both form x·W and s·B·A·x in float32 and differ in the order of a few roundings of 6e-8 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / "result"


@pytest.fixture
def peft_model(build_llama: Build, adapter: Path) -> Callable[..., PeftModel]:
    """Return a maker of a model that PEFT has adapted; the adapter is saved."""

    def make(**settings: Any) -> PeftModel:
        config = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": TARGETS,
            "init_lora_weights": False,
            **settings,
        }
        model = get_peft_model(
            build_llama(), PeftLoraConfig(task_type="CAUSAL_LM", **config)
        ).eval()
        model.save_pretrained(adapter, save_embedding_layers=False)
        return model

    return make


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Return a check that an export raises and that every file is then what it was."""

    def check(action: Callable[[], object], error: type[LoraError], message: str) -> None:
        before = tree(tmp_path)
        with pytest.raises(error, match=message):
            action()
        assert tree(tmp_path) == before

    return check


@pytest.fixture
def llama_config(llama_folder: Path) -> Path:
    return llama_folder / "config.json"


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """Return module path → PEFT's own ΔW."""
    names = (
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    )
    return {name: module.get_delta_weight("default").detach() for name, module in names}


# PEFT


def test_the_peft_export_is_the_adapter_byte_for_byte(adapter_folder: Path, result: Path) -> None:
    sha256 = export_peft(adapter_folder, result)
    assert tree(result) == tree(adapter_folder)
    assert (
        json.loads((result / "adapter_identity.json").read_text(encoding="utf-8"))["adapter_sha256"]
        == sha256
    )


def test_patterns_survive_the_peft_export(
    peft_model: Callable[..., PeftModel],
    build_llama: Build,
    logits: Logits,
    adapter: Path,
    result: Path,
) -> None:
    theirs = peft_model(**SETTINGS["patterns"])
    export_peft(adapter, result)
    assert torch.equal(
        logits(PeftModel.from_pretrained(build_llama(), result).eval()), logits(theirs)
    )


def test_a_damaged_adapter_is_not_passed_on(
    adapter_folder: Path, result: Path, refused: Callable[..., None]
) -> None:
    path = adapter_folder / "adapter_model.safetensors"
    (adapter_folder / "adapter_identity.json").unlink()  # PEFT's own adapters have none
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    refused(
        lambda: export_peft(adapter_folder, result), AdapterError, "model.layers.1.self_attn.q_proj"
    )
    save_file({**tensors, key: torch.full_like(tensors[key], torch.nan)}, path)
    refused(lambda: export_peft(adapter_folder, result), AdapterError, "not finite")


@pytest.mark.parametrize("where", ["adapter", "adapter/inside", "."])
@pytest.mark.parametrize("kind", ["peft", "vllm", "gguf"])
def test_a_destination_over_the_adapter_is_refused(
    adapter_folder: Path,
    tmp_path: Path,
    llama_config: Path,
    refused: Callable[..., None],
    kind: str,
    where: str,
) -> None:
    """The folder would be replaced, with everything else that lies in it."""
    exports: dict[str, Callable[[], object]] = {
        "peft": lambda: export_peft(adapter_folder, tmp_path / where),
        "vllm": lambda: export_vllm(adapter_folder, tmp_path / where, max_rank=8),
        "gguf": lambda: export_gguf(adapter_folder, tmp_path / where, base_config=llama_config),
    }
    refused(exports[kind], ExportError, "overlaps")


def test_an_exchanged_weights_file_is_not_passed_on(
    adapter_folder: Path, result: Path, refused: Callable[..., None]
) -> None:
    path = adapter_folder / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    refused(lambda: export_peft(adapter_folder, result), AdapterError, "its sidecar says")


# vLLM


@each_setting
def test_the_vllm_export_computes_the_same_in_peft(
    peft_model: Callable[..., PeftModel],
    build_llama: Build,
    logits: Logits,
    adapter: Path,
    result: Path,
    settings: dict[str, Any],
) -> None:
    theirs = peft_model(**settings)
    export_vllm(adapter, result, max_rank=16)
    loaded = PeftModel.from_pretrained(
        build_llama(), result
    ).eval()  # a warning, as of a missing key, is an error here
    torch.testing.assert_close(logits(loaded), logits(theirs), **CLOSE)
    assert (logits(loaded) - logits(build_llama())).abs().max() > 0.1


@each_setting
def test_a_reader_of_one_rank_and_one_scale_finds_every_update(
    peft_model: Callable[..., PeftModel],
    build_llama: Build,
    adapter: Path,
    result: Path,
    settings: dict[str, Any],
) -> None:
    """vLLM as it is: alpha/r (or alpha/√r) of the config for every module, whatever the patterns say."""
    expected = deltas(peft_model(**settings))
    export_vllm(adapter, result, max_rank=512)
    assert vllm_objections(result, build_llama(), 512) == []
    assert bool(vllm_objections(adapter, build_llama(), 512)) == any(
        "pattern" in name for name in settings
    )  # it would misread those
    assert adapter_values(result)["r"] in VLLM_RANKS
    found = vllm_updates(result)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def test_the_vllm_export_keeps_what_the_adapter_was_trained_on(
    adapted: LlamaForCausalLM,
    build_llama: Build,
    adapter_folder: Path,
    result: Path,
    logits: Logits,
) -> None:
    """The sidecar goes along, with the new digest: our own strict load takes the export, and refuses another base."""
    export_vllm(adapter_folder, result, max_rank=8)
    model = build_llama()
    load_adapter(model, result)
    torch.testing.assert_close(logits(model), logits(adapted), **CLOSE)
    with pytest.raises(AdapterError, match="was trained on tiny llama"):
        load_adapter(build_llama(seed=1), result)


def test_the_vllm_export_repeats_its_bytes(adapter_folder: Path, result: Path) -> None:
    first = export_vllm(adapter_folder, result, max_rank=8), tree(result)
    assert (export_vllm(adapter_folder, result, max_rank=8), tree(result)) == first


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:Adapter 'default'. 10 LoRA:UserWarning"
)  # PEFT takes the biases for misshapen matrices
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True and vLLM has no DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*vLLM has no modules trained whole"),
        ({"bias": "lora_only"}, "bias='lora_only' and vLLM has no trained biases"),
        ({"lora_bias": True}, "lora_bias=True and vLLM has no bias in B"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts embeddings"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 17}},
            "layers.1.self_attn.q_proj has rank 17 and max_rank is 16",
        ),
    ],
    ids=str,
)
def test_what_vllm_lacks_is_refused(
    peft_model: Callable[..., PeftModel],
    adapter: Path,
    result: Path,
    refused: Callable[..., None],
    settings: dict[str, Any],
    message: str,
) -> None:
    peft_model(**settings)
    refused(lambda: export_vllm(adapter, result, max_rank=16), ExportError, message)


def test_a_rank_that_vllm_cannot_be_started_with_is_refused(
    adapter_folder: Path, result: Path, refused: Callable[..., None]
) -> None:
    refused(
        lambda: export_vllm(adapter_folder, result, max_rank=24),
        ExportError,
        "max_rank=24 is no max_lora_rank of vLLM",
    )


# GGUF


@each_setting
def test_the_gguf_holds_every_update(
    peft_model: Callable[..., PeftModel],
    build_llama: Build,
    adapter: Path,
    tmp_path: Path,
    llama_config: Path,
    settings: dict[str, Any],
) -> None:
    """llama.cpp forms alpha / (rank of the tensor) · B A; four heads of q and two of k are in its order of rows."""
    expected = deltas(peft_model(**settings))
    export_gguf(adapter, tmp_path / "adapter.gguf", base_config=llama_config)
    assert gguf_objections(tmp_path / "adapter.gguf", build_llama()) == []
    found = gguf_updates(tmp_path / "adapter.gguf", heads=4, key_heads=2)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("module", "name"), [("q_proj", "attn_q"), ("k_proj", "attn_k")])
def test_transformers_finds_the_rows_where_they_were(
    peft_model: Callable[..., PeftModel],
    adapter: Path,
    tmp_path: Path,
    llama_config: Path,
    module: str,
    name: str,
) -> None:
    """What transformers undoes when it loads a GGUF model gives PEFT's B back, bit for bit."""
    model = peft_model()
    export_gguf(adapter, tmp_path / "adapter.gguf", base_config=llama_config)
    stored = read_gguf(tmp_path / "adapter.gguf")[1][f"blk.1.{name}.weight.lora_b"]
    processor = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    expected = (
        getattr(model.base_model.model.model.layers[1].self_attn, module)
        .lora_B["default"]
        .weight.detach()
    )
    assert not np.array_equal(stored, expected)
    assert np.array_equal(processor.process(stored, f"blk.1.{name}.weight").weights, expected)


def test_the_gguf_has_the_shapes_llama_cpp_checks(
    peft_model: Callable[..., PeftModel], adapter: Path, tmp_path: Path, llama_config: Path
) -> None:
    """GGUF counts dimensions from the inside: A is (in, r) and B (r, out) there."""
    peft_model(target_modules=["down_proj"])
    export_gguf(adapter, tmp_path / "adapter.gguf", base_config=llama_config.parent)
    shapes = {
        tensor.name: tensor.shape.tolist()
        for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors
    }
    assert shapes["blk.0.ffn_down.weight.lora_a"] == [128, 4]
    assert shapes["blk.0.ffn_down.weight.lora_b"] == [4, 64]


def test_qwen_keeps_the_order_of_its_rows(
    peft_model: Callable[..., PeftModel], adapter: Path, tmp_path: Path, llama_config: Path
) -> None:
    model = peft_model(target_modules=["q_proj"])
    base = json.loads(llama_config.read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps({**base, "model_type": "qwen2"}), encoding="utf-8"
    )
    export_gguf(adapter, tmp_path / "adapter.gguf", base_config=tmp_path, architecture="qwen2")
    fields, tensors = read_gguf(tmp_path / "adapter.gguf")
    expected = (
        model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight.detach()
    )
    assert fields["general.architecture"] == "qwen2"
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"], expected)


def test_a_former_gguf_is_replaced_and_its_bytes_repeat(
    adapter_folder: Path, result: Path, llama_config: Path
) -> None:
    result.write_text("old", encoding="utf-8")
    first = export_gguf(adapter_folder, result, base_config=llama_config), result.read_bytes()
    assert (
        export_gguf(adapter_folder, result, base_config=llama_config),
        result.read_bytes(),
    ) == first
    assert [path.name for path in result.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gpt2"}, "architecture='gpt2' is unknown here"),
        ({"architecture": "qwen2"}, "model_type 'llama', which llama.cpp does not store as qwen2"),
    ],
    ids=str,
)
def test_another_architecture_is_refused(
    adapter_folder: Path,
    result: Path,
    llama_config: Path,
    refused: Callable[..., None],
    options: dict[str, str],
    message: str,
) -> None:
    refused(
        lambda: export_gguf(adapter_folder, result, base_config=llama_config, **options),
        ExportError,
        message,
    )


def test_a_base_config_that_is_missing_is_refused(
    adapter_folder: Path, tmp_path: Path, result: Path, refused: Callable[..., None]
) -> None:
    refused(
        lambda: export_gguf(adapter_folder, result, base_config=tmp_path / "none"),
        CheckpointError,
        "is missing",
    )


def test_a_base_config_without_sizes_is_refused(
    adapter_folder: Path, tmp_path: Path, result: Path, refused: Callable[..., None]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    refused(
        lambda: export_gguf(adapter_folder, result, base_config=tmp_path),
        CheckpointError,
        "has no vocab_size",
    )


def test_a_target_that_llama_cpp_has_not_is_refused(
    adapter_folder: Path, result: Path, llama_config: Path, refused: Callable[..., None]
) -> None:
    path = adapter_folder / "adapter_model.safetensors"
    save_file(
        {key.replace("q_proj", "extra_proj"): tensor for key, tensor in load_file(path).items()},
        path,
    )
    (adapter_folder / "adapter_identity.json").unlink()
    message = "llama has no tensor for model.layers.0.self_attn.extra_proj"
    refused(
        lambda: export_gguf(adapter_folder, result, base_config=llama_config), ExportError, message
    )


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": 4}, {"hidden_size": 128}, {"head_dim": 32}], ids=str
)
def test_a_base_of_other_shapes_is_refused(
    peft_model: Callable[..., PeftModel],
    adapter: Path,
    tmp_path: Path,
    llama_config: Path,
    refused: Callable[..., None],
    change: dict[str, int],
) -> None:
    """With another number of heads the rows would be put in a wrong order without a word."""
    peft_model(target_modules=["k_proj"])
    base = json.loads(llama_config.read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**base, **change}), encoding="utf-8")
    refused(
        lambda: export_gguf(adapter, tmp_path / "result", base_config=tmp_path),
        ExportError,
        r"k_proj is \(32, 64\) and this base has",
    )


def test_a_tied_head_has_no_tensor_in_gguf(
    peft_model: Callable[..., PeftModel],
    adapter: Path,
    tmp_path: Path,
    result: Path,
    llama_config: Path,
    refused: Callable[..., None],
) -> None:
    peft_model(target_modules=["lm_head"])
    base = json.loads(llama_config.read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps({**base, "tie_word_embeddings": True}), encoding="utf-8"
    )
    refused(
        lambda: export_gguf(adapter, result, base_config=tmp_path),
        ExportError,
        "lm_head is tied to the embedding",
    )
    export_gguf(adapter, tmp_path / "untied.gguf", base_config=llama_config)
    assert "output.weight.lora_a" in read_gguf(tmp_path / "untied.gguf")[1]


# Merged


@each_setting
def test_the_merged_model_computes_the_same_in_transformers(
    peft_model: Callable[..., PeftModel],
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
    torch.testing.assert_close(
        logits(loaded), logits(theirs), rtol=0, atol=1e-5 * logits(theirs).abs().max().item()
    )
    assert (logits(loaded) - plain).abs().max() > 0.1
