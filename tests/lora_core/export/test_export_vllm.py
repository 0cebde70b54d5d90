"""The vLLM export, read back by PEFT, by this library and by a reader of one rank and one scale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.readers import adapter_values, vllm_objections, vllm_updates
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import AdapterError, load_adapter
from lora_core.errors import ExportError
from lora_core.export.export import VLLM_RANKS, export_vllm

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
Files = Callable[[Path], dict[str, bytes]]
Deltas = Callable[[PeftModel], dict[str, Tensor]]
MakePeft = Callable[..., PeftModel]
Refused = Callable[..., None]
# PEFT 0.21 uses a name that transformers renames in version 6; this does not concern the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
# Both compute x·W and s·B·A·x in float32 and differ by the order of a few roundings of 6e-8 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_the_vllm_export_computes_the_same_in_peft(
    peft_model: MakePeft,
    build_llama: Build,
    logits: Logits,
    adapter: Path,
    result: Path,
    settings: dict[str, Any],
) -> None:
    theirs = peft_model(**settings)
    export_vllm(adapter, result, max_rank=16)
    # A warning, such as about a missing key, is an error here.
    loaded = PeftModel.from_pretrained(build_llama(), result).eval()
    torch.testing.assert_close(logits(loaded), logits(theirs), **CLOSE)
    assert (logits(loaded) - logits(build_llama())).abs().max() > 0.1


def test_a_reader_of_one_rank_and_one_scale_finds_every_update(
    peft_model: MakePeft,
    build_llama: Build,
    deltas: Deltas,
    adapter: Path,
    result: Path,
    settings: dict[str, Any],
) -> None:
    """vLLM applies the config's alpha/r (or alpha/√r) to every module and ignores the patterns."""
    expected = deltas(peft_model(**settings))
    export_vllm(adapter, result, max_rank=512)
    assert vllm_objections(result, build_llama(), 512) == []
    # vLLM would misread patterns.
    has_patterns = any("pattern" in name for name in settings)
    assert bool(vllm_objections(adapter, build_llama(), 512)) == has_patterns
    assert adapter_values(result)["r"] in VLLM_RANKS
    found = vllm_updates(result)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def test_the_vllm_export_keeps_the_identity_of_the_base(
    adapted: LlamaForCausalLM,
    build_llama: Build,
    adapter_folder: Path,
    result: Path,
    logits: Logits,
) -> None:
    """With the copied sidecar, the strict load accepts the export and refuses another base."""
    export_vllm(adapter_folder, result, max_rank=8)
    model = build_llama()
    load_adapter(model, result)
    torch.testing.assert_close(logits(model), logits(adapted), **CLOSE)
    with pytest.raises(AdapterError, match="was trained on tiny llama"):
        load_adapter(build_llama(seed=1), result)


def test_repeated_vllm_exports_have_the_same_bytes(
    adapter_folder: Path, result: Path, files: Files
) -> None:
    sha256 = export_vllm(adapter_folder, result, max_rank=8)
    before = files(result)
    assert export_vllm(adapter_folder, result, max_rank=8) == sha256
    assert files(result) == before


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
# PEFT mistakes the biases for matrices of a wrong shape.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 10 LoRA:UserWarning")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True, but vLLM does not support DoRA"),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save=.*vLLM does not support fully trained modules",
        ),
        ({"bias": "lora_only"}, "bias='lora_only', but vLLM does not support trained biases"),
        ({"lora_bias": True}, "lora_bias=True, but vLLM does not support bias in B"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts embeddings"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 17}},
            "layers.1.self_attn.q_proj has rank 17, but max_rank is 16",
        ),
    ],
    ids=str,
)
def test_a_feature_that_vllm_does_not_support_is_refused(
    peft_model: MakePeft,
    adapter: Path,
    result: Path,
    refused: Refused,
    settings: dict[str, Any],
    message: str,
) -> None:
    peft_model(**settings)
    refused(lambda: export_vllm(adapter, result, max_rank=16), ExportError, message)


def test_a_max_rank_that_vllm_does_not_support_is_refused(
    adapter_folder: Path, result: Path, refused: Refused
) -> None:
    refused(
        lambda: export_vllm(adapter_folder, result, max_rank=24),
        ExportError,
        "max_rank=24 is not a max_lora_rank of vLLM",
    )
