"""What is compared with PEFT: a model, and an adapter's settings under their common names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from parity.models import Build, Pictures, bert, cast, gemma, gpt2, llama, mixtral, phi3, stored
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn

from lora_core import LoraConfig
from lora_core.init.spectral import is_spectral


@dataclass(frozen=True)
class Tolerance:
    """The allowed difference, as a fraction of the largest logit and of the largest gradient."""

    logits: float
    gradients: float


FLOAT32 = Tolerance(1e-5, 2e-5)
"""Both compute the same sums in different orders: some hundred roundings of 6e-8 per pass."""
BFLOAT16, FLOAT16 = Tolerance(0.036, 0.15), Tolerance(0.0074, 0.014)
"""Both round at every step, but PEFT rounds the update later.

The tolerance is twice the dtype's own error relative to float32: 0.018 and 0.0037 for the logits of
the base without an adapter, 0.07 and 0.007 for PEFT's own gradients.
"""
INT8 = Tolerance(0.01, 0.01)
"""Inputs are rounded to 8 bits: another rounding of a sum moves one by 1/127 of the largest."""


Inputs = Callable[[], Mapping[str, Tensor]]
"""Returns the arguments of a model's forward, the same at every call."""


def tokens() -> Mapping[str, Tensor]:
    """Return few distinct tokens, so that the trained rows occur."""
    generator = torch.Generator().manual_seed(5)
    return {"input_ids": torch.randint(0, 12, (2, 9), generator=generator)}


def pictures() -> Mapping[str, Tensor]:
    return {"input_ids": torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))}


@dataclass(frozen=True)
class Case:
    """A model and an adapter for it."""

    build: Build
    fields: Mapping[str, Any]
    """The settings, with the names of both libraries."""
    peft: Mapping[str, Any] = field(default_factory=dict)
    """Additional settings that PEFT needs."""
    tolerance: Tolerance = FLOAT32
    inputs: Inputs = tokens

    @property
    def config(self) -> LoraConfig:
        return LoraConfig(**self.fields)

    @property
    def in_peft(self) -> PeftLoraConfig:
        """The same settings as PEFT's config, with lists for tuples."""
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in self.fields.items()
        }
        if "trainable_token_indices" in plain:
            plain["trainable_token_indices"] = {
                name: list(rows) for name, rows in plain["trainable_token_indices"].items()
            }
        return PeftLoraConfig(**plain, **self.peft)

    @property
    def is_spectral(self) -> bool:
        """Whether A and B are initialized from the weight, which doubles the rank in the file."""
        return is_spectral(self.fields.get("init_lora_weights", "kaiming"))

    @property
    def converts_in_peft(self) -> bool:
        """Whether PEFT can save its own adapter for an unchanged base.

        It refuses spectral initialization together with rsLoRA and patterns.
        """
        return not (
            self.is_spectral
            and self.config.use_rslora
            and (self.config.rank_pattern or self.config.alpha_pattern)
        )

    def base(self) -> nn.Module:
        """Return the model, with the same bits at every call."""
        torch.manual_seed(3)
        return self.build().eval()

    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits, or the last hidden state, of a model, ours or PEFT's."""
        found = model(**self.inputs())
        if isinstance(found, Tensor):
            return found.float()
        is_headless = "logits" not in found
        return (found.last_hidden_state if is_headless else found.logits).float()


def case(
    build: Build,
    peft: Mapping[str, Any] | None = None,
    tolerance: Tolerance = FLOAT32,
    inputs: Inputs = tokens,
    **fields: Any,
) -> Case:
    """Return a case with default settings for those that are not given."""
    return Case(
        build,
        {"r": 4, "lora_alpha": 8, "target_modules": ("q_proj", "up_proj"), **fields},
        peft or {},
        tolerance,
        inputs,
    )


def four_bit(quant_type: str, *, double: bool) -> Build:
    settings = {
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    return stored(llama, load_in_4bit=True, **settings)


tied_llama, biased_llama = partial(llama, tied=True), partial(llama, bias=True)
TRANSPOSED = {"fan_in_fan_out": True}
ATTENTION = ("c_attn", "c_proj")
CONVS = ("first", "second", "proj_out")
FUSED = ("qkv_proj", "gate_up_proj")
EMBEDDED = ("embed_tokens", "q_proj")
TOKENS = {"embed_tokens": (7, 3)}
DENSE = {
    "llama, all linear layers": case(llama, target_modules="all-linear"),
    "llama, gaussian initialization": case(llama, init_lora_weights="gaussian"),
    "llama, orthogonal initialization": case(llama, init_lora_weights="orthogonal"),
    "llama, PiSSA": case(llama, init_lora_weights="pissa"),
    "llama, PiSSA, rsLoRA, rank_pattern": case(
        llama, init_lora_weights="pissa_niter_4", use_rslora=True, rank_pattern={"q_proj": 2}
    ),
    "llama, OLoRA": case(llama, init_lora_weights="olora"),
    "llama, rank_pattern, alpha_pattern": case(
        llama,
        rank_pattern={"q_proj": 2, r"1\.mlp\.up_proj": 6},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
    ),
    "llama, rsLoRA, rank_pattern": case(llama, use_rslora=True, rank_pattern={"q_proj": 2}),
    "llama, rsLoRA, alpha_pattern": case(
        llama, use_rslora=True, alpha_pattern={"q_proj": 3, r"1\.mlp\.up_proj": 20}
    ),
    "llama, exclude_modules": case(llama, exclude_modules=("layers.0.self_attn.q_proj",)),
    "llama, layers_to_transform": case(llama, layers_to_transform=(1,)),
    "llama, modules_to_save": case(llama, modules_to_save=("lm_head",)),
    "llama, bias of all": case(biased_llama, bias="all"),
    "llama, bias of the targets": case(biased_llama, bias="lora_only"),
    "llama, lora_bias": case(llama, lora_bias=True),
    "llama, DoRA": case(llama, use_dora=True),
    "llama with biases, DoRA, rsLoRA": case(biased_llama, use_dora=True, use_rslora=True),
    "llama, embedding": case(llama, target_modules=EMBEDDED),
    "llama, embedding, DoRA": case(llama, target_modules=EMBEDDED, use_dora=True),
    "llama, token rows": case(llama, trainable_token_indices=TOKENS),
    "llama, tied, token rows": case(tied_llama, trainable_token_indices=TOKENS),
    "llama, tied, token rows, all linear layers, rsLoRA": case(
        tied_llama, trainable_token_indices=TOKENS, target_modules="all-linear", use_rslora=True
    ),
    "gemma, scaled embedding": case(gemma, target_modules=EMBEDDED),
    "gemma, scaled embedding, DoRA": case(gemma, target_modules=EMBEDDED, use_dora=True),
    "gemma, token rows": case(gemma, trainable_token_indices=TOKENS),
    "phi3, fused qkv and gate-up": case(phi3, target_modules=FUSED),
    "phi3, fused qkv and gate-up, DoRA": case(phi3, target_modules=FUSED, use_dora=True),
    "mixtral, experts and attention": case(
        mixtral,
        target_modules=("q_proj",),
        target_parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "mixtral, experts alone": case(
        mixtral, target_modules=(), target_parameters=("experts.down_proj",)
    ),
    "gpt2, fused Conv1D": case(gpt2, TRANSPOSED, target_modules=ATTENTION),
    "gpt2, fused Conv1D, DoRA": case(gpt2, TRANSPOSED, target_modules=ATTENTION, use_dora=True),
    "gpt2, bias of all": case(gpt2, TRANSPOSED, target_modules=("c_attn",), bias="all"),
    "gpt2, embedding": case(gpt2, TRANSPOSED, target_modules=("wte", "c_attn")),
    "bert, modules_to_save": case(
        bert, target_modules=("query", "value", "dense"), modules_to_save=("classifier",)
    ),
    "bert, bias of all": case(bert, target_modules=("query",), bias="all"),
    "convolutions": case(Pictures, inputs=pictures, target_modules=CONVS),
    "convolutions, DoRA": case(Pictures, inputs=pictures, target_modules=CONVS, use_dora=True),
    "convolutions, lora_bias": case(
        Pictures, inputs=pictures, target_modules=CONVS, lora_bias=True
    ),
    "convolutions, bias of the targets": case(
        Pictures, inputs=pictures, target_modules=CONVS, bias="lora_only"
    ),
}

STORED = {
    "llama in bfloat16": case(cast(llama, torch.bfloat16), tolerance=BFLOAT16),
    "llama in bfloat16, DoRA": case(cast(llama, torch.bfloat16), tolerance=BFLOAT16, use_dora=True),
    "llama in float16": case(cast(llama, torch.float16), tolerance=FLOAT16),
    "llama in NF4": case(four_bit("nf4", double=False)),
    "llama in NF4, double quantization": case(four_bit("nf4", double=True)),
    "llama in NF4, double quantization, DoRA": case(four_bit("nf4", double=True), use_dora=True),
    "llama in FP4": case(four_bit("fp4", double=False)),
    "llama in FP4, double quantization": case(four_bit("fp4", double=True)),
    "llama in int8": case(stored(llama, load_in_8bit=True), tolerance=INT8),
}
CASES = {**DENSE, **STORED}
