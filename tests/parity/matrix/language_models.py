"""Tiny random models of transformers that `parity.models` does not have."""

from typing import Any

import transformers as hf
from parity.models import GROUPED, LABELS, NO_DROPOUT, SIZES, VOCABULARY
from torch import nn

ENCODER = {
    **SIZES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 32,
}
STD = SIZES["initializer_range"]
PICTURE = {"image_size": 8, "num_channels": 3, "num_labels": LABELS}


def qwen2() -> nn.Module:
    """Biases in q, k and v only."""
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, tie_word_embeddings=False))


def qwen3() -> nn.Module:
    """Norms of queries and keys; the head is tied."""
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True))


def gpt_neox() -> nn.Module:
    """One matrix for q, k and v; parallel blocks; unusual names of embedding and head."""
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**SIZES, max_position_embeddings=32, hidden_dropout=0.0)
    )


def gptj() -> nn.Module:
    """A head with a bias."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}
    return hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=VOCABULARY, **sizes, **NO_DROPOUT, initializer_range=STD)
    )


def opt() -> nn.Module:
    """Learned positions, biases everywhere; the head is tied."""
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            dropout=0.0,
            init_std=STD,
        )
    )


def falcon() -> nn.Module:
    """Linear layers of its own class; the head is tied."""
    return hf.FalconForCausalLM(hf.FalconConfig(**SIZES, attention_dropout=0.0))


def bloom() -> nn.Module:
    """Its own attention with a fused matrix; a norm after the embedding; the head is tied."""
    return hf.BloomForCausalLM(
        hf.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=STD
        )
    )


def llama_classifier() -> nn.Module:
    """A decoder with a classifier instead of the output head."""
    return hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**GROUPED, num_labels=LABELS, pad_token_id=0)
    )


def roberta() -> nn.Module:
    """A masked language model whose head is tied and has its own bias."""
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER))


def deberta() -> nn.Module:
    """Disentangled attention, without any head."""
    return hf.DebertaV2Model(
        hf.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"])
    )


def distilbert() -> nn.Module:
    """A classifier of tokens."""
    return hf.DistilBertForTokenClassification(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            initializer_range=STD,
            num_labels=LABELS,
        )
    )


def t5() -> nn.Module:
    """One embedding for encoder, decoder and head."""
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            initializer_factor=1.0,
            decoder_start_token_id=0,
        )
    )


def bart() -> nn.Module:
    """Learned positions; one embedding for encoder, decoder and head."""
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=VOCABULARY, **_two_towers()))


def whisper() -> nn.Module:
    """Convolutions over a spectrogram, then an encoder-decoder."""
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCABULARY,
            **_two_towers(),
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def vit() -> nn.Module:
    """Pictures as patches."""
    encoder = {key: ENCODER[key] for key in ENCODER if "vocab" not in key and "max" not in key}
    return hf.ViTForImageClassification(hf.ViTConfig(**encoder, **PICTURE, patch_size=4))


def resnet() -> nn.Module:
    """Convolutions with batch norms."""
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            num_channels=3,
            num_labels=LABELS,
            embedding_size=8,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            layer_type="basic",
        )
    )


def _two_towers() -> dict[str, Any]:
    return {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "init_std": STD,
    }
