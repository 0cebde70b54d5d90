"""The task type in the file makes PEFT wrap the model with a forward that the model accepts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lora_core import Identity, LoraConfig, inject, load_adapter, save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def whisper() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(
        **sizes,
        **heads,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config).eval()


def sounds() -> Any:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,),
        conv_stride=(4,),
        conv_kernel=(4,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
    )
    return Wav2Vec2ForSequenceClassification(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    return T5ForConditionalGeneration(T5Config(num_heads=2, **sizes)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    return BertForSequenceClassification(config).eval()


TOKENS = torch.arange(3, 9)[None]
CASES = {
    "Whisper": (
        whisper,
        {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": TOKENS},
        ("q_proj", "v_proj"),
        (),
        None,
    ),
    "Wav2Vec2 classifier": (
        sounds,
        {"input_values": torch.randn(1, 100)},
        ("q_proj",),
        ("classifier",),
        None,
    ),
    "BERT": (bert, {"input_ids": TOKENS}, ("query",), ("classifier",), "SEQ_CLS"),
    "BERT without its head": (bert, {"input_ids": TOKENS}, ("query",), ("word_embeddings",), None),
    "T5": (t5, {"input_ids": TOKENS, "decoder_input_ids": TOKENS}, ("q",), (), "SEQ_2_SEQ_LM"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_peft_computes_with_the_file(case: tuple[Any, ...], tmp_path: Path) -> None:
    build, inputs, targets, saved, task_type = case
    model = build()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, modules_to_save=saved)
    inject(model, config, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    expected = model(**inputs).logits
    save_adapter(model, tmp_path, config, Identity())
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["task_type"] == task_type
    reference = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(reference(**inputs).logits, expected, rtol=0, atol=1e-5)
    loaded = build()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
