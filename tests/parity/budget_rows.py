"""The budget compared with published values, for models on the meta device: nothing is loaded.

Each row has what is compared, the computed value, and the published value with its tolerance.
GPU memory that others measured includes their code, their CUDA context and their allocator's
reserve.
"""

from functools import cache
from typing import Any

import torch
from parity.rows import Row, at_least, at_most, near
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from lora_core import LoraConfig, Target, plan_targets
from lora_core.budget.budget import Budget, budget
from lora_core.budget.setup import Setup

GIB = 1024**3


@cache
def gpt3() -> nn.Module:
    """GPT-3's shapes (Brown et al. 2020, table 2.1) in an open architecture: 96 layers, 12,288."""
    return _on_meta(
        OPTForCausalLM,
        OPTConfig(
            vocab_size=50257,
            hidden_size=12288,
            num_hidden_layers=96,
            ffn_dim=49152,
            num_attention_heads=96,
            word_embed_proj_dim=12288,
        ),
    )


@cache
def llama_65b() -> nn.Module:
    """LLaMA 65B (Touvron et al. 2023, table 2)."""
    return _llama(intermediate_size=22016)


@cache
def llama_2_70b() -> nn.Module:
    """Llama 2 70B, with 8 heads of keys and values."""
    return _llama(intermediate_size=28672, num_key_value_heads=8)


def published_rows() -> list[Row]:
    """Return a row for each published value: what, value, unit, goal, holds."""
    return [*_gpt3_rows(), *_qlora_rows(), *_zero3_rows()]


def _gpt3_rows() -> list[Row]:
    """LoRA (arXiv 2106.09685): section 4.2, and 37.7M weights in table 4."""
    half = {"tokens": 1, "compute_bytes": 2}
    full, rank4 = (
        budget(gpt3(), Setup("full", **half)),
        _adapted(gpt3(), Setup("lora", **half), 4, ("q_proj", "v_proj")),
    )
    rank8 = _adapted(gpt3(), Setup("lora", **half), 8, ("q_proj", "v_proj"))
    kept = [cost.weight_bytes + cost.optimizer_bytes for cost in (full, rank4)]
    return [
        near(
            "GPT-3 175B, q and v at rank 4: trained weights, full over LoRA",
            full.trained_weights / rank4.trained_weights,
            10_000,
            0.1,
            "×",
        ),
        near(
            "GPT-3 175B, q and v at rank 8: trained weights",
            rank8.trained_weights / 1e6,
            37.7,
            0.005,
            "M",
        ),
        near(
            "GPT-3 175B at rank 4: checkpoint in 16 bits",
            rank4.trained_weights * 2 / 1e6,
            35,
            0.1,
            "MB",
        ),
        near(
            "GPT-3 175B: checkpoint of full fine-tuning in 16 bits",
            full.file_bytes / 1e9,
            350,
            0.01,
            "GB",
        ),
        near(
            "GPT-3 175B: weights and Adam's moments, LoRA over full", kept[1] / kept[0], 1 / 3, 0.01
        ),
        near(
            "GPT-3 175B at rank 4: memory of weights, gradients and Adam",
            _without_passes(rank4) / 1e9,
            350,
            0.01,
            "GB",
        ),
        near(
            "GPT-3 175B full: memory of weights, gradients and Adam",
            _without_passes(full) / 1e9,
            1200,
            0.2,
            "GB",
        ),
    ]


def _qlora_rows() -> list[Row]:
    """QLoRA (arXiv 2305.14314): abstract; rank 64 on every linear layer, batch of 1, 512 tokens."""
    setup = Setup("qlora", tokens=512, compute_bytes=2, checkpointing=True, logit_rows=512)
    cost = _adapted(llama_65b(), setup, 64)
    full = budget(llama_65b(), Setup("full", tokens=512, sharding="zero1", checkpointing=True))
    return [
        at_most("LLaMA 65B, QLoRA at rank 64, all on one GPU", cost.memory_bytes / GIB, 48, "GiB"),
        at_most(
            "the same, Adam's states paged out",
            (cost.memory_bytes - cost.optimizer_bytes) / GIB,
            48,
            "GiB",
        ),
        at_least(
            "LLaMA 65B, full fine-tuning in 16 bits with float32 masters",
            full.memory_bytes / 1e9,
            780,
            "GB",
        ),
    ]


def _zero3_rows() -> list[Row]:
    """PEFT's guide to QLoRA with DeepSpeed ZeRO-3.

    2 GPUs, rank 8 on every linear layer, 2 × 2048 tokens, all logits.
    """
    setup = Setup(
        "qlora",
        tokens=4096,
        sharding="zero3",
        processes=2,
        checkpointing=True,
        dropout=True,
        logit_rows=4096,
        process_bytes=GIB,
    )
    cost = _adapted(llama_2_70b(), setup, 8)
    return [
        near(
            "Llama 2 70B, QLoRA under ZeRO-3, a GPU of two",
            cost.memory_bytes / 1e9,
            36.6,
            0.15,
            "GB",
        )
    ]


def _adapted(
    model: nn.Module, setup: Setup, rank: int, modules: str | tuple[str, ...] = "all-linear"
) -> Budget:
    targets: list[Target] = plan_targets(
        model, LoraConfig(r=rank, lora_alpha=16, target_modules=modules)
    )
    return budget(model, setup, targets)


def _without_passes(cost: Budget) -> float:
    return cost.weight_bytes + cost.gradient_bytes + cost.optimizer_bytes


def _llama(**changes: int) -> nn.Module:
    shape = {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    return _on_meta(LlamaForCausalLM, LlamaConfig(**{**shape, **changes}))


def _on_meta(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model
