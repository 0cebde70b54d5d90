"""Banks of several adapters with noise, and the rows of a mixed batch."""

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lora_core import Bank, LoraConfig

ROWS = ["a", "b", None, "a", "c"]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
ON_EXPERTS = {
    "a": LoraConfig(r=2, lora_alpha=4, target_modules=(), target_parameters=EXPERTS),
    "b": LoraConfig(r=3, lora_alpha=3, target_modules=(), target_parameters=EXPERTS[1:]),
    "c": LoraConfig(r=2, lora_alpha=8, target_modules=("q_proj",)),
}
DORA = {
    "a": LoraConfig(r=2, lora_alpha=4, use_dora=True),
    "b": LoraConfig(r=3, lora_alpha=9, target_modules=("q_proj", "up_proj"), use_dora=True),
    "c": LoraConfig(r=2, lora_alpha=8, target_modules=("q_proj", "down_proj")),
}
BIASES = {
    "a": LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "o_proj"), bias="lora_only"),
    "b": LoraConfig(r=3, lora_alpha=9, target_modules=("q_proj",), lora_bias=True),
    "c": LoraConfig(r=2, lora_alpha=8, target_modules=("q_proj",)),
}
SPECTRAL = {
    "a": LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",), init_lora_weights="pissa"),
    "b": LoraConfig(r=3, lora_alpha=9, target_modules=("q_proj", "v_proj")),
    "c": LoraConfig(r=2, lora_alpha=8, target_modules=("q_proj",), init_lora_weights="olora"),
}


def make_mixtral(*, kernel: str = "eager") -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
        experts_implementation=kernel,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def bank_over(model: nn.Module, configs: dict[str, LoraConfig]) -> Bank:
    """Return a bank of adapters with noise."""
    bank = Bank(model)
    for seed, (name, config) in enumerate(configs.items()):
        bank.add(name, config, seed=seed)
        with torch.no_grad():
            for number, parameter in enumerate(bank.parameters(name)):
                generator = torch.Generator().manual_seed(100 * seed + number)
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bank


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def own_rows(name: str | None) -> list[int]:
    return [index for index, owner in enumerate(ROWS) if owner == name]


def pop_gradients(bank: Bank, name: str) -> list[Tensor]:
    """Return the gradients of an adapter, and reset them."""
    gradients: list[Tensor] = []
    for parameter in bank.parameters(name):
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients
