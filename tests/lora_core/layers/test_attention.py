"""nn.MultiheadAttention is adapted as in PEFT, also where its parent reads its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lora_core import (
    Bank,
    Identity,
    LoraConfig,
    RoutingError,
    TargetError,
    check_used,
    inject,
    load_adapter,
    merge,
    plan_targets,
    save_adapter,
    unmerge,
)

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.out(attended)


def build(**settings: Any) -> Model:
    torch.manual_seed(0)
    return Model(**settings).eval()


def encoder() -> nn.Module:
    """Return a layer whose fast path reads the weights of its attention."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()


def config(**settings: Any) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 3, "target_modules": ("attention", "out"), **settings}
    return LoraConfig(**options)


def train(model: nn.Module) -> None:
    """Change what is trained by random values."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("layout", [{}, {"bias": False}, {"add_bias_kv": True}], ids=str)
def test_files_are_read_both_ways(
    settings: dict[str, Any], layout: dict[str, Any], tmp_path: Path
) -> None:
    model = build(**layout)
    inject(model, config(**settings), seed=0)
    torch.testing.assert_close(model(X), build(**layout)(X), rtol=0, atol=1e-6)
    train(model)
    save_adapter(model, tmp_path / "ours", config(**settings), Identity())
    reference = PeftModel.from_pretrained(build(**layout), tmp_path / "ours")
    torch.testing.assert_close(model(X), reference(X), rtol=1e-4, atol=1e-5)

    options = {"r": 2, "lora_alpha": 3, "target_modules": ["attention", "out"], **settings}
    trained = get_peft_model(build(**layout), PeftConfig(**options)).eval()
    train(trained)
    trained.save_pretrained(tmp_path / "theirs")
    loaded = build(**layout)
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(X), trained(X), rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_peft(tmp_path: Path) -> None:
    model = build()
    inject(model, config(), seed=0)
    train(model)
    save_adapter(model, tmp_path, config(), Identity())
    reference = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    gradients: list[dict[str, Tensor]] = []
    for one in (model, reference):
        one(X).square().sum().backward()
        found = {name: value.grad for name, value in one.named_parameters() if value.requires_grad}
        gradients.append(found)
    ours, theirs = gradients
    # PEFT adds the update of the output projection twice and differentiates it once.
    names = {
        "attention.lora_A": "attention.lora_A.default.weight",
        "attention.lora_B": "attention.lora_B.default.weight",
        "attention.out_A": "attention.base_layer.out_proj.lora_A.default.weight",
        "attention.out_B": "attention.base_layer.out_proj.lora_B.default.weight",
    }
    for name, peft_name in names.items():
        factor = 2 if "out" in name else 1
        expected = factor * theirs[f"base_model.model.{peft_name}"]
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [build, encoder])
def test_merged_projections_compute_the_same(make: Any) -> None:
    targets = ("attention",) if make is build else ("self_attn", "linear1")
    model = make()
    with torch.no_grad():
        before = model(X)
    inject(model, config(target_modules=targets), seed=0)
    check_used(model, lambda: model(X))
    with torch.no_grad():
        torch.testing.assert_close(model(X), before, rtol=0, atol=1e-5)
    train(model)
    with torch.no_grad():
        adapted = model(X)
    torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)  # without the fast path
    assert (adapted - before).abs().max() > 0.01
    merged = merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)
        unmerge(model, merged)
        assert torch.equal(model(X), adapted)


def test_plan_counts_the_trained_weights() -> None:
    model = build()
    targets = plan_targets(model, config())
    assert [target.layer for target in targets] == ["attention", "linear"]
    inject(model, config(), seed=0)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert sum(target.trained_weights for target in targets) == trained


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other sizes": ({"kdim": 4}, {}, "separate projections of query, key and value"),
    "dora": ({}, {"use_dora": True}, "use_dora=True is not supported by attention"),
    "bias in B": ({}, {"lora_bias": True}, "lora_bias=True is not supported by attention"),
    "bias": ({}, {"bias": "lora_only"}, "bias='lora_only' is not supported by attention"),
    "dropout": ({}, {"lora_dropout": 0.1, "target_modules": ("attention",)}, "has no effect on"),
    "projection": ({}, {"target_modules": ("out_proj",)}, "attention.out_proj, which cannot be"),
}


@pytest.mark.parametrize(("layout", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_peft_refuses_or_ignores_is_refused(
    layout: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    model = build(**layout)
    with pytest.raises(TargetError, match=message):
        inject(model, config(**settings), seed=0)
    assert type(model.attention) is nn.MultiheadAttention


def test_rows_of_several_adapters_are_refused() -> None:
    bank = Bank(build())
    bank.add("one", config(), seed=0)
    match = "updates the weights of a MultiheadAttention"
    with pytest.raises(RoutingError, match=match), bank.rows(["one", None]):
        pass
