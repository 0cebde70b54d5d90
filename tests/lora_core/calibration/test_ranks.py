"""Ranks move to the layers whose inputs offer more, as PEFT moves them; the sum and the scales stay."""

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
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning"
    ),
]


class Chain(nn.Module):
    """Three layers of ever fewer directions: the inputs of the second lie in 5 of 20, those of the third in 2 of 12."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        left, right, narrow = (
            torch.randn(shape, generator=generator) for shape in ((20, 5), (5, 24), (2, 20))
        )
        self.first, self.second, self.third = (
            nn.Linear(24, 20, bias=False),
            nn.Linear(20, 12, bias=False),
            nn.Linear(12, 8, bias=False),
        )
        self.first.weight.data = left @ right
        self.second.weight.data = torch.randn(12, 2, generator=generator) @ narrow
        self.third.weight.data = torch.randn(8, 12, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def rows() -> Tensor:
    """Return rows with a mean of zero, which PEFT takes off, and directions of unequal strength."""
    half = torch.randn(300, 24, generator=torch.Generator().manual_seed(7)) * 0.7 ** torch.arange(
        24
    )
    return torch.cat([half, -half])


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": ("first", "second", "third"), **fields}
    )


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_ranks_are_those_of_peft(rho: float) -> None:
    settings = PeftLoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["first", "second", "third"],
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
    ours = {
        target.name: target.rank
        for target in plan_targets(
            model, eva_ranks(model, config(), [lambda: model(rows())], rho=rho)
        )
    }
    layers = {name: getattr(theirs.base_model.model, name) for name in ("first", "second", "third")}
    assert ours == {
        name: layer.r["default"] for name, layer in layers.items() if hasattr(layer, "r")
    }
    assert sum(ours.values()) == 9
    assert (len(set(ours.values())) > 1) == (rho > 1)


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"second": 1}, "rank_pattern": {"first": 2}}],
    ids=str,
)
def test_the_sum_and_the_scales_stay(fields: dict[str, Any]) -> None:
    model, before = Chain(), config(**fields)
    after = eva_ranks(model, before, [lambda: model(rows())])
    old, new = (
        {target.name: target for target in plan_targets(model, one)} for one in (before, after)
    )
    assert sum(target.rank for target in old.values()) == sum(
        target.rank for target in new.values()
    )
    assert {name: target.rank for name, target in old.items()} != {
        name: target.rank for name, target in new.items()
    }
    assert all(
        target.scale == pytest.approx(old[name].scale, rel=1e-12) for name, target in new.items()
    )


def test_the_new_config_is_injected_saved_and_loaded_by_peft(
    build_llama: Build,
    tokens: Tensor,
    logits: Callable[[nn.Module], Tensor],
    randomise: Callable[[nn.Module], None],
    tmp_path: Path,
) -> None:
    model = build_llama()
    push = [partial(model, input_ids=tokens, use_cache=False)]
    moved = eva_ranks(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights="eva"), push)
    targets = inject(model, moved, seed=0, data=push)
    assert sum(target.rank for target in targets) == 4 * 14
    assert max(target.rank for target in targets) > 4 > min(target.rank for target in targets)
    randomise(model)
    save_adapter(model, tmp_path, moved, Identity())
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_a_layer_that_offers_least_is_left_out() -> None:
    """White inputs: each of the first layer's 24 directions holds one part in 24, and those of the others a fifth or more."""
    model, white = Chain(), torch.randn(600, 24)
    moved = eva_ranks(model, config(r=1), [lambda: model(white)], rho=2)
    assert moved.target_modules == ("second", "third")
    assert sum(target.rank for target in plan_targets(model, moved)) == 3


@pytest.mark.parametrize("rho", [0.5, math.nan, math.inf])
def test_a_rho_that_breaks_its_rule_is_refused(rho: float) -> None:
    with pytest.raises(ConfigError, match=f"rho={rho}"):
        eva_ranks(Chain(), config(), [], rho=rho)


def test_what_reads_no_rows_is_refused(build_llama: Build) -> None:
    with pytest.raises(TargetError, match=r"'eva' has no effect on model\.embed_tokens"):
        eva_ranks(
            build_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=("embed_tokens",)), []
        )
