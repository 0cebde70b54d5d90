"""A tiny Mixtral with adapted experts."""

from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lora_core.layers.expert_layout import STACKS
from lora_core.layers.experts import LoraExperts
from lora_core.layers.parameters import parameter_targets
from lora_core.modules import plain_modules, replace_module

VOCABULARY, HIDDEN, INNER, EXPERTS, RANK, SCALE = 101, 32, 48, 4, 2, 1.5
PREFIX = "base_model.model."
BOTH, GATE_UP, DOWN = STACKS, STACKS[:1], STACKS[1:]
each_choice = pytest.mark.parametrize(
    "names", [BOTH, GATE_UP, DOWN], ids=["both", "gate_up", "down"]
)


def make_mixtral(
    *, dtype: torch.dtype = torch.float32, chosen: int = 3, kernel: str = "eager"
) -> MixtralForCausalLM:
    """Return a Mixtral of two layers.

    With three experts per token, the order in which their outputs are added matters.
    """
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=chosen,
        initializer_range=0.1,
        experts_implementation=kernel,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).to(torch.bfloat16).to(dtype).eval()


def adapt(model: nn.Module, names: tuple[str, ...] = BOTH, *, noise: bool = True) -> nn.Module:
    """Adapt the stacks `names` of every layer, with noise in B or with B zero."""
    for path, stacks in parameter_targets(plain_modules(model), names).items():
        layer = LoraExperts(model.get_submodule(path), dict.fromkeys(stacks, (RANK, SCALE)))
        layer.reset(path, "kaiming", seed=3)
        replace_module(model, path, layer)
        if noise:
            fill_with_noise(layer)
    return model


@torch.no_grad()
def fill_with_noise(layer: LoraExperts) -> None:
    generator = torch.Generator().manual_seed(11)
    for b in layer.lora_B.values():
        b.copy_(0.3 * torch.randn(b.shape, generator=generator))


def experts_of(model: nn.Module) -> dict[str, LoraExperts]:
    return {
        path: module for path, module in model.named_modules() if isinstance(module, LoraExperts)
    }


def tensors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's tensors under PEFT's keys."""
    tensors = {}
    for path, layer in experts_of(model).items():
        for key, tensor in layer.adapter_tensors().items():
            tensors[f"{PREFIX}{path}.{key}"] = tensor
    return tensors


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def make_layer(names: tuple[str, ...] = BOTH) -> LoraExperts:
    return adapt(make_mixtral(), names).get_submodule("model.layers.0.mlp.experts")


def peft_config(names: tuple[str, ...]) -> PeftLoraConfig:
    """Return PEFT's config of the adapter, with noise in A and B."""
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=SCALE * RANK,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in names],
        init_lora_weights=False,
    )
