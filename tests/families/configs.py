"""A tiny config of each family, with windows and caps small enough to affect 40 tokens.

A config starts from the family's defaults. Every setting whose name matches a rule is replaced,
also in nested configs. EXCEPTIONS fixes what the rules leave inconsistent.
"""

import re
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, LAYERS, HEADS, KEY_HEADS, HEAD_WIDTH, WINDOW = 200, 64, 4, 4, 2, 16, 8
RULES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size(_per_layer_input)?|n_vocab", VOCABULARY),
    (r"(pad|eos|bos|sep|cls|decoder_start)_token_id", None),  # numbered below
    (r"hidden_size|d_model|n_embd|dim|embedding_size|emb_dim|lru_width", WIDTH),
    (
        r"(dense_)?intermediate_size(_mlp)?|ffn_dim|n_inner|d_inner|ffn_hidden_size|"
        r"(decoder|encoder)_ffn_dim|prefix_dense_intermediate_size",
        96,
    ),
    (
        r"(moe|shared_expert|moe_shared_expert|shared)_intermediate_size|"
        r"(expert|shared_experts)_\w+_size|router_hidden_size",
        32,
    ),
    (r"num_hidden_layers|n_layers?|num_layers", LAYERS),
    (r"(decoder|encoder)_layers|num_(decoder|encoder)_layers", 2),
    (
        r"(num_|n_|swa_num_)?(attention_)?heads?|(decoder|encoder)_attention_heads|"
        r"linear_num_value_heads|linear_num_heads",
        HEADS,
    ),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads", KEY_HEADS),
    (
        r"(swa_)?(v_)?head_dim|dim_head|d_head|attention_head_size|kv_channels|"
        r"linear_(key|value)?_?head_dim|index_head_dim",
        HEAD_WIDTH,
    ),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|"
        r"max_target_positions",
        256,
    ),
    (
        r"sliding_window(_size)?|window_size|attention_window_size|attention_chunk_size|"
        r"local_attention",
        WINDOW,
    ),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|\w*num_local_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|moe_top_k|top_k_experts|num_experts_per_token", 2),
    (
        r"n_shared_experts|num_shared_experts|n_group|topk_group|first_k_dense_replace|"
        r"num_dense_layers",
        1,
    ),
    (r"kv_lora_rank|mamba_dt_rank|time_step_rank|laurel_rank", 16),
    (r"q_lora_rank", 24),
    (r"qk_(rope|nope)_head_dim|rotary_dim|d_rel", 8),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_chunk_size|chunk_size", 8),
    (r"mamba_(n_heads|num_heads)|(num|n)_mamba_heads", 8),
    (r"mamba_(d_head|head_dim|headdim)", HEAD_WIDTH),
    (r"(mamba_)?n_?groups", 1),
    (r"index_n_heads|(mamba_)?expand", 2),
    (r"index_topk", 8),
    (r"query_pre_attn_scalar", 16),
    (r"final_logit_softcapping|logits_soft_cap", 3.0),
    (r"attn_logit_softcapping", 2.0),
    (r"logit_scale", 0.25),
    (r"logits_scaling", 4.0),
    (r"lm_head_multiplier", 0.4),
    (r"embedding_multiplier", 2.0),
    (r"residual_multiplier", 0.6),
    (r"attention_multiplier", 0.2),
    (r"hidden_size_per_layer_input", 16),
    (r"\w*(dropout|pdrop|layerdrop|jitter_noise)\w*", 0.0),
    (r"expert_layer_period|attn_layer_period", 2),
    (r"expert_layer_offset|attn_layer_offset", 1),
    (r"is_decoder", True),
)
"""Pattern of a setting's name → its value; the first rule that matches the full name applies."""
TOKENS = {
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "sep_token_id": 1,
    "cls_token_id": 2,
    "decoder_start_token_id": 2,
}
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


def layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds)}


EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{
        name: layers(SLIDING, FULL, SLIDING, FULL)
        for name in ("gemma2", "gemma3_text", "ministral", "gpt_oss", "dots1", "laguna", "mellum")
    },
    **{
        name: layers(SLIDING, SLIDING, SLIDING, FULL)
        for name in ("cohere2", "olmo3", "exaone4", "afmoe", "cohere_compass_text")
    },
    **{
        name: layers(LINEAR, LINEAR, LINEAR, FULL)
        for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")
    },
    **{
        name: {"num_key_value_heads": HEADS}
        for name in (
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "dots3_note_text",
            "youtu",
            "minicpm3",
            "axk1",
            "axk2",
        )
    },
    "lfm2": layers("conv", FULL, "conv", FULL),
    "lfm2_moe": layers("conv", FULL, "conv", FULL),
    "granitemoehybrid": layers("mamba", "mamba", "attention", "mamba"),
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], **layers(FULL, FULL, FULL, FULL)},
    "llama4_text": {
        "no_rope_layers": [1, 1, 1, 0],
        "moe_layers": [1, 3],
        **layers(*["chunked_attention"] * 3, FULL),
    },
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "falcon": {"num_kv_heads": KEY_HEADS, "new_decoder_architecture": True, "bias": True},
    "opt": {"word_embed_proj_dim": WIDTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mpt": {
        "expansion_ratio": 2,
        "logit_scale": 0.5,
        "attn_config": {"alibi": True},
        "resid_pdrop": 0.0,
        "emb_pdrop": 0.0,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_expand": 2},
    "bamba": {"attn_layer_indices": [1]},
    "kimi_linear": {"num_key_value_heads": HEADS, **layers(LINEAR, LINEAR, LINEAR, FULL)},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": [LINEAR, LINEAR, "hybrid", LINEAR, "hybrid"],
        "n_mamba_heads": 2,
    },
    "longcat_flash": {
        "num_layers": 2,
        "zero_expert_num": 2,
        "head_dim": 8,
        "num_key_value_heads": HEADS,
    },
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_hidden_layers": 3,
    },
    "stablelm": {"partial_rotary_factor": 0.25},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_WIDTH, "expand": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        **layers(SLIDING, FULL, SLIDING, FULL),
    },
    "zamba2": {"layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"], "n_mamba_heads": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 32,
            "hidden_size": WIDTH,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3 with a window": ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3_moe with a window": ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 2}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mistral, window beyond the text": ("mistral", {"sliding_window": 64}),
    "llama, scaled rotary positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "falcon 7B": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": True, "bias": False},
    ),
    "falcon with ALiBi": (
        "falcon",
        {
            "alibi": True,
            "new_decoder_architecture": False,
            "multi_query": False,
            "num_kv_heads": HEADS,
        },
    ),
    "opt 350M": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt2, scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gemma2 as published": (
        "gemma2",
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
    ),
    "gemma3 as published": (
        "gemma3_text",
        {"final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window": 512},
    ),
    "granite as published": (
        "granite",
        {
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
        },
    ),
    "cohere2 as published": ("cohere2", {"logit_scale": 0.0625, "sliding_window": 4096}),
}
"""Name → (family, settings that differ)."""


def families() -> list[str]:
    """Return every family of causal language models that transformers has, and the variants."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """Return the tiny config of a family or variant; `changes` are settings that differ."""
    family, own = VARIANTS.get(name, (name, {}))
    return _tiny(CONFIG_MAPPING[family], family, {**own, **changes})


def _tiny(kind: type[PreTrainedConfig], family: str, changes: dict[str, Any]) -> PreTrainedConfig:
    values = {
        name: value for name in _settings(kind) if (value := _by_rule(name)) is not _UNCHANGED
    }
    values |= EXCEPTIONS.get(family, {}) | changes
    for name, inner in (getattr(kind, "sub_configs", None) or {}).items():
        found = _class_of(kind, name, inner)
        if name not in values and found is not None:
            values[name] = _tiny(found, found.model_type, {}).to_dict()
    return kind(**values)


_UNCHANGED = object()


def _by_rule(name: str) -> Any:
    if name in TOKENS:
        return TOKENS[name]
    return next((value for pattern, value in RULES if re.fullmatch(pattern, name)), _UNCHANGED)


def _settings(kind: type[PreTrainedConfig]) -> list[str]:
    return [one.name for one in fields(kind)] if is_dataclass(kind) else []


def _class_of(kind: type[PreTrainedConfig], name: str, inner: Any) -> type[PreTrainedConfig] | None:
    """Return the class of a nested config; if it is not declared, that of the default instance."""
    if isinstance(inner, type) and getattr(inner, "model_type", ""):
        return inner
    own = getattr(kind(), name, None)
    return type(own) if isinstance(own, PreTrainedConfig) else None
