"""EVA's ranks match those of PEFT; the sum of the ranks and the scales do not change."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    ConfigError,
    Identity,
    LoraConfig,
    TargetError,
    eva_ranks,
    inject,
    plan_targets,
    save_adapter,
)

Build = Callable[..., LlamaForCausalLM]
LAYERS = ("first", "second", "third")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning"
    ),
]


class Chain(nn.Module):
    """Three layers with fewer and fewer input directions: 24 of 24, 5 of 20, and 2 of 12."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        left = torch.randn(20, 5, generator=generator)
        right = torch.randn(5, 24, generator=generator)
        narrow = torch.randn(2, 20, generator=generator)
        self.first = nn.Linear(24, 20, bias=False)
        self.second = nn.Linear(20, 12, bias=False)
        self.third = nn.Linear(12, 8, bias=False)
        self.first.weight.data = left @ right
        self.second.weight.data = torch.randn(12, 2, generator=generator) @ narrow
        self.third.weight.data = torch.randn(8, 12, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def rows() -> Tensor:
    """Return rows with mean zero (PEFT subtracts the mean) and directions of unequal strength."""
    generator = torch.Generator().manual_seed(7)
    half = torch.randn(300, 24, generator=generator) * 0.7 ** torch.arange(24)
    return torch.cat([half, -half])


def ranks_of(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    return {target.name: target.rank for target in plan_targets(model, config)}


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": LAYERS, **fields})


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_ranks_match_peft(rho: float) -> None:
    settings = PeftLoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(LAYERS),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=0.999),
    )
    theirs = get_peft_model(Chain(), settings)
    plain: dict[str, Any] = {
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
        "show_progress_bar": False,
    }
    initialize_lora_eva_weights(theirs, [{"x": rows()}], **plain)
    model = Chain()
    ours = ranks_of(model, eva_ranks(model, config(), [lambda: model(rows())], rho=rho))
    expected = {}
    for name in LAYERS:
        layer = getattr(theirs.base_model.model, name)
        if hasattr(layer, "r"):
            expected[name] = layer.r["default"]
    assert ours == expected
    assert sum(ours.values()) == 9
    assert (len(set(ours.values())) > 1) == (rho > 1)


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"second": 1}, "rank_pattern": {"first": 2}}],
    ids=str,
)
def test_sum_of_ranks_and_scales_do_not_change(fields: dict[str, Any]) -> None:
    model = Chain()
    before = config(**fields)
    after = eva_ranks(model, before, [lambda: model(rows())])
    old_ranks = ranks_of(model, before)
    new_ranks = ranks_of(model, after)
    assert old_ranks != new_ranks
    assert sum(old_ranks.values()) == sum(new_ranks.values())
    old_scales = {target.name: target.scale for target in plan_targets(model, before)}
    for target in plan_targets(model, after):
        assert target.scale == pytest.approx(old_scales[target.name], rel=1e-12)


def test_peft_loads_adapter_with_redistributed_ranks(
    build_llama: Build,
    tokens: Tensor,
    logits: Callable[[nn.Module], Tensor],
    randomize: Callable[[nn.Module], None],
    tmp_path: Path,
) -> None:
    model = build_llama()
    batches = [partial(model, input_ids=tokens, use_cache=False)]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="eva")
    redistributed = eva_ranks(model, config, batches)
    targets = inject(model, redistributed, seed=0, data=batches)
    assert sum(target.rank for target in targets) == 4 * 14
    assert max(target.rank for target in targets) > 4 > min(target.rank for target in targets)
    randomize(model)
    save_adapter(model, tmp_path, redistributed, Identity())
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_layer_with_weakest_directions_is_excluded() -> None:
    """With white inputs, a direction explains 1/24 in the first layer, 1/5 or more in others."""
    model = Chain()
    white = torch.randn(600, 24)
    redistributed = eva_ranks(model, config(r=1), [lambda: model(white)], rho=2)
    assert redistributed.target_modules == ("second", "third")
    assert sum(ranks_of(model, redistributed).values()) == 3


@pytest.mark.parametrize("rho", [0.5, math.nan, math.inf])
def test_invalid_rho_raises(rho: float) -> None:
    with pytest.raises(ConfigError, match=f"rho={rho}"):
        eva_ranks(Chain(), config(), [], rho=rho)


def test_embedding_target_raises(build_llama: Build) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("embed_tokens",))
    with pytest.raises(TargetError, match=r"'eva' has no effect on model\.embed_tokens"):
        eva_ranks(build_llama(), config, [])
