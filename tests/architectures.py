"""Tiny models of each architecture with its own memory count, and the bytes autograd saves."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from lora_core.training.attention import Segment, use_segments
from pipelines.models.forward import PACKED

Build = Callable[[], PreTrainedModel]
SIZES = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {
    **SIZES,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,  # the first block has no experts
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,  # as wide as a key; otherwise PyTorch's attention saves a table on a CPU
    "experts_implementation": "eager",
}
GPT2 = {
    "vocab_size": 101,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def llama(activation: str = "silu") -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=128, hidden_act=activation)
    )


def mixtral(kernel: str = "eager", *, experts: int = 4, chosen: int = 2) -> MixtralForCausalLM:
    mixture = {
        "num_local_experts": experts,
        "num_experts_per_tok": chosen,
        "experts_implementation": kernel,
    }
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=96, **mixture)
    )


def deepseek_v3(query: int | None = 24) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**LATENT, "q_lora_rank": query}))


def deepseek_v2() -> DeepseekV2ForCausalLM:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**LATENT))


def gpt2(activation: str = "gelu_new") -> GPT2LMHeadModel:
    config = GPT2Config(
        **GPT2, activation_function=activation, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            **SIZES, ffn_dim=256, word_embed_proj_dim=64, dropout=0.0, max_position_embeddings=256
        )
    )


def kept_per_token(model: PreTrainedModel) -> float:
    """Return the bytes that autograd saves per token of a forward pass, without the head."""
    model.set_attn_implementation(PACKED)
    return (kept_bytes(model, 120) - kept_bytes(model, 40)) / 80


def kept_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the storages that autograd saves in a forward pass, without weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor  # keeps the storage alive, so no address is used twice
        return tensor

    ids = torch.randint(0, 101, (1, tokens), generator=torch.Generator().manual_seed(2))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    options = {
        "position_ids": torch.arange(tokens)[None],
        "attention_mask": everywhere,
        "use_cache": False,
    }
    with (
        use_segments([Segment(tokens // 2)] * 2),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output = model.base_model(input_ids=ids, **options)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
