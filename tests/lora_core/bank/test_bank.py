"""Several adapters on one base: mixed, each computes what it computes alone; none is the base."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    Bank,
    Identity,
    LoraConfig,
    RoutingError,
    TargetError,
    inject,
    load_adapter,
    lora_layers,
)
from lora_core.bank.routing import TOKENS

Build = Callable[..., LlamaForCausalLM]
A = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"))
B = LoraConfig(r=2, lora_alpha=16, target_modules=("q_proj", "up_proj"), lora_dropout=0.3)
C = LoraConfig(r=3, lora_alpha=3, target_modules=("v_proj",), use_dora=True)
CONFIGS = {"a": A, "b": B, "c": C}


@pytest.fixture
def bank(build_llama: Build) -> Bank:
    """A bank of three adapters with noise."""
    bank = Bank(build_llama())
    for seed, (name, config) in enumerate(CONFIGS.items()):
        bank.add(name, config, seed=seed)
        with bank.using(name), torch.no_grad():
            for number, parameter in enumerate(bank.parameters(name)):
                generator = torch.Generator().manual_seed(100 * seed + number)
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bank


@pytest.fixture
def batch() -> Tensor:
    return torch.randint(0, 101, (5, 7), generator=torch.Generator().manual_seed(8))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def load_alone(build_llama: Build, bank: Bank, name: str, folder: Path) -> LlamaForCausalLM:
    """Save the adapter and load it into a separate model."""
    bank.save(name, folder / name, Identity())
    model = build_llama()
    load_adapter(model, folder / name)
    return model


@torch.no_grad()
def test_one_adapter_at_a_time_or_none(
    build_llama: Build, bank: Bank, batch: Tensor, tmp_path: Path
) -> None:
    base = logits(build_llama(), batch)
    assert torch.equal(logits(bank.model, batch), base)
    sums = set()
    for name in bank.names:
        bank.use(name)
        found = logits(bank.model, batch)
        alone = load_alone(build_llama, bank, name, tmp_path)
        assert torch.equal(found, logits(alone, batch))
        with bank.using(None):
            assert torch.equal(logits(bank.model, batch), base)
        assert bank.active == name
        sums.add(found.sum().item())
    assert len(sums) == 3


@torch.no_grad()
def test_each_row_of_a_batch_has_its_own_adapter(bank: Bank, batch: Tensor) -> None:
    names = ["a", None, "c", "b", "a"]
    separate = []
    for row, name in zip(batch, names, strict=True):
        with bank.using(name):
            separate.append(logits(bank.model, row[None])[0])
    with bank.rows(names):
        mixed = logits(bank.model, batch)
    torch.testing.assert_close(mixed, torch.stack(separate), rtol=1e-5, atol=1e-5)
    assert not list(lora_layers(bank.model))


def test_adapters_trained_together_get_the_gradients_they_get_alone(
    bank: Bank, batch: Tensor
) -> None:
    bank.model.train()
    for _, layer in _layers(bank, "b"):
        layer.dropout = 0.0  # two draws would differ
    names = ["a", "b", "b", "c", "a"]
    together: dict[str, list[Tensor]] = {}
    with bank.rows(names):
        (logits(bank.model, batch) ** 2).sum().backward()
    for name in bank.names:
        together[name] = [p.grad.clone() for p in bank.parameters(name)]
        for parameter in bank.parameters(name):
            parameter.grad = None
    for name in bank.names:
        rows = [index for index, owner in enumerate(names) if owner == name]
        with bank.using(name):
            (logits(bank.model, batch[rows]) ** 2).sum().backward()
        for mixed, parameter in zip(together[name], bank.parameters(name), strict=True):
            torch.testing.assert_close(mixed, parameter.grad, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_each_segment_of_a_pack_has_its_own_adapter(bank: Bank) -> None:
    """Rows are routed along the tokens: a module sees (1, T, I)."""
    layer = bank.model.model.layers[0].self_attn
    x = torch.randn(1, 9, 64)
    with bank.rows(["a", "b"], dim=TOKENS, lengths=[4, 5]):
        mixed = layer.q_proj(x)
    for name, part in (("a", slice(0, 4)), ("b", slice(4, 9))):
        with bank.using(name):
            expected = layer.q_proj(x[:, part])
        torch.testing.assert_close(mixed[:, part], expected, rtol=1e-5, atol=1e-5)


def test_each_adapter_has_its_own_learning_rate(bank: Bank) -> None:
    groups = bank.parameter_groups({"a": 1e-2, "b": 1e-3})
    assert [(group["name"], group["lr"]) for group in groups] == [("a", 1e-2), ("b", 1e-3)]
    before = [parameter.detach().clone() for parameter in bank.parameters("c")]
    optimizer = torch.optim.SGD(groups)
    for parameter in [*bank.parameters("a"), *bank.parameters("b")]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip(bank.parameters("c"), before, strict=True):
        assert torch.equal(parameter, old)


def test_a_batch_of_another_size_is_refused(bank: Bank, batch: Tensor) -> None:
    with bank.rows(["a", "b"]), pytest.raises(RoutingError, match="names 2 rows"):
        logits(bank.model, batch)


def test_unknown_and_duplicate_names_are_refused(bank: Bank, build_llama: Build) -> None:
    with pytest.raises(AdapterError, match="no adapter 'd'; it has a, b, c"):
        bank.use("d")
    with pytest.raises(AdapterError, match="already has an adapter 'a'"):
        bank.add("a", A, seed=0)
    model = build_llama()
    inject(model, A, seed=0)
    with pytest.raises(AdapterError, match="no bank owns"):
        Bank(model)


def test_a_refused_adapter_leaves_the_bank_unchanged(bank: Bank, batch: Tensor) -> None:
    bank.use("a")
    before = logits(bank.model, batch)
    with pytest.raises(TargetError, match="matches no module"):
        bank.add("d", LoraConfig(r=2, lora_alpha=2, target_modules=("q_prjo",)), seed=0)
    assert bank.names == ["a", "b", "c"] and bank.active == "a"
    assert torch.equal(logits(bank.model, batch), before)


@torch.no_grad()
def test_an_adapter_is_loaded_and_removed(
    bank: Bank, build_llama: Build, batch: Tensor, tmp_path: Path
) -> None:
    bank.save("b", tmp_path / "b", Identity())
    other = Bank(build_llama())
    other.load("v1.0", tmp_path / "b")  # not valid in a module path
    other.use("v1.0")
    bank.use("b")
    assert torch.equal(logits(other.model, batch), logits(bank.model, batch))
    other.remove("v1.0")
    assert other.names == [] and other.active is None
    assert torch.equal(logits(other.model, batch), logits(build_llama(), batch))


@torch.no_grad()
def test_an_adapter_removed_while_another_is_active_is_not_restored(
    bank: Bank, build_llama: Build, batch: Tensor
) -> None:
    bank.use("a")
    with bank.using("b"):
        bank.remove("a")
    assert bank.active is None
    assert torch.equal(logits(bank.model, batch), logits(build_llama(), batch))


def test_no_adapter_is_active_while_rows_are_routed(bank: Bank) -> None:
    bank.use("a")
    with bank.rows(["b", "c"]):
        assert bank.active is None
    assert bank.active == "a"


def test_nested_adapters_are_refused(bank: Bank, batch: Tensor) -> None:
    """One fully trains a block's MLP, another adapts a layer in it: no module can combine both."""
    before = logits(bank.model, batch)
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=("v_proj",), modules_to_save=("layers.1.mlp",)
    )
    mlp = "model.layers.1.mlp"
    message = f"adapter 'd' changes {mlp}, and another .* {mlp}.(down|up)_proj"
    with pytest.raises(AdapterError, match=message):
        bank.add("d", config, seed=0)
    assert bank.names == ["a", "b", "c"]
    assert torch.equal(logits(bank.model, batch), before)


def test_dropout_in_a_mixed_batch_has_the_configured_probability(bank: Bank) -> None:
    """A and B copy one input, so that the update shows if it was dropped: 0, or 1/(1 − 0.3)."""
    q_proj = bank.model.model.layers[0].self_attn.q_proj
    x = torch.ones(40, 50, 64)
    layer = dict(_layers(bank, "b"))["model.layers.0.self_attn.q_proj"]
    bank.model.train()
    with torch.no_grad(), bank.rows(["b"] * 40):
        layer.train()
        layer.lora_A.zero_()[0, 0] = 1
        layer.lora_B.zero_()[0, 0] = 1 / layer.scale
        update = (bank.model.model.layers[0].self_attn.q_proj(x) - q_proj(x))[..., 0]
    kept = update.abs() > 0.5
    expected = torch.full_like(update[kept], 1 / 0.7)
    torch.testing.assert_close(update[kept], expected, rtol=1e-4, atol=1e-4)
    # 2000 draws: the fraction has a standard deviation of √(0.3 · 0.7 / 2000) = 0.01.
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.05)


def _layers(bank: Bank, name: str) -> list[tuple[str, nn.Module]]:
    with bank.using(name):
        return list(lora_layers(bank.model))
