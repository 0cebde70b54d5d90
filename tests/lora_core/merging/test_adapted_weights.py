"""Weights and merged weights read from files equal those of PEFT's merge."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from lora_core.adapter.contents import read_contents
from lora_core.errors import MergeError
from lora_core.merging.adapted_weights import adapted_weights, check_base

# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def gpt2(width: int = 32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_embd=width, n_layer=1, n_head=2, n_positions=16)
    )


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_merged_weights_equal_pefts_where_the_files_store_in_out(
    tmp_path: Path, use_dora: bool
) -> None:
    """GPT-2 stores weights as (in, out); c_attn is 32 → 96, and c_proj of the attention square."""
    gpt2().save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4,
        target_modules=["c_attn", "attn.c_proj"],
        init_lora_weights=False,
        use_dora=use_dora,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(gpt2(), config)
    theirs.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = theirs.merge_and_unload().state_dict()
    stored = gpt2().state_dict()
    with adapted_weights(read_contents(tmp_path / "adapter"), tmp_path / "base") as weights:
        assert set(weights) == {"transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"}
        for name in weights:
            adapted = weights[name]
            assert torch.equal(adapted.weight, stored[f"{name}.weight"].T)
            expected = merged[f"{name}.weight"].T
            torch.testing.assert_close(adapted.merged(), expected, rtol=1e-5, atol=1e-6)
            assert weights.shape(name) == tuple(expected.shape)


def test_a_base_of_another_width_is_refused(tmp_path: Path) -> None:
    gpt2(64).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    get_peft_model(gpt2(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"is \(96, 32\) and its weight \(64, 192\)"):
        check_base(read_contents(tmp_path / "adapter"), tmp_path / "base")
