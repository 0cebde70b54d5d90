"""Several adapters on one base: what each computes in company is what it computes alone, and off is the base."""

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
    """A bank of three adapters, each with noise in it."""
    bank = Bank(build_llama())
    for seed, (name, config) in enumerate(CONFIGS.items()):
        bank.add(name, config, seed=seed)
        with bank.using(name), torch.no_grad():
            for number, parameter in enumerate(bank.parameters(name)):
                parameter.add_(
                    0.1
                    * torch.randn(
                        parameter.shape,
                        generator=torch.Generator().manual_seed(100 * seed + number),
                    )
                )
    return bank


@pytest.fixture
def batch() -> Tensor:
    return torch.randint(0, 101, (5, 7), generator=torch.Generator().manual_seed(8))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def alone(build_llama: Build, bank: Bank, name: str, folder: Path) -> LlamaForCausalLM:
    """Return the adapter in a model of its own, through its files."""
    bank.save(name, folder / name, Identity())
    model = build_llama()
    load_adapter(model, folder / name)
    return model


@torch.no_grad()
def test_one_at_a_time_and_none(
    build_llama: Build, bank: Bank, batch: Tensor, tmp_path: Path
) -> None:
    assert torch.equal(logits(bank.model, batch), logits(build_llama(), batch))
    for name in bank.names:
        bank.use(name)
        assert torch.equal(
            logits(bank.model, batch), logits(alone(build_llama, bank, name, tmp_path), batch)
        )
        with bank.using(None):
            assert torch.equal(logits(bank.model, batch), logits(build_llama(), batch))
        assert bank.active == name
    assert (
        len({logits(bank.model, batch).sum().item() for name in bank.names if not bank.use(name)})
        == 3
    )


@torch.no_grad()
def test_each_row_of_a_batch_has_its_own(bank: Bank, batch: Tensor) -> None:
    names = ["a", None, "c", "b", "a"]
    apart = []
    for row, name in zip(batch, names, strict=True):
        with bank.using(name):
            apart.append(logits(bank.model, row[None])[0])
    with bank.rows(names):
        mixed = logits(bank.model, batch)
    torch.testing.assert_close(mixed, torch.stack(apart), rtol=1e-5, atol=1e-5)
    assert not list(lora_layers(bank.model))


def test_trained_together_each_gets_the_gradient_it_gets_alone(bank: Bank, batch: Tensor) -> None:
    bank.model.train()
    for name in ("b",):
        for _, layer in _layers(bank, name):
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
        with bank.using(name):
            (
                logits(bank.model, batch[[place for place, one in enumerate(names) if one == name]])
                ** 2
            ).sum().backward()
        for mixed, parameter in zip(together[name], bank.parameters(name), strict=True):
            torch.testing.assert_close(mixed, parameter.grad, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_stretches_of_a_pack_have_their_own(bank: Bank) -> None:
    """Rows along the tokens: a module sees (1, T, I)."""
    layer = bank.model.model.layers[0].self_attn
    x = torch.randn(1, 9, 64)
    with bank.rows(["a", "b"], dim=TOKENS, lengths=[4, 5]):
        mixed = layer.q_proj(x)
    for name, part in (("a", slice(0, 4)), ("b", slice(4, 9))):
        with bank.using(name):
            torch.testing.assert_close(
                mixed[:, part], layer.q_proj(x[:, part]), rtol=1e-5, atol=1e-5
            )


def test_each_adapter_has_a_rate_of_its_own(bank: Bank) -> None:
    groups = bank.parameter_groups({"a": 1e-2, "b": 1e-3})
    assert [(group["name"], group["lr"]) for group in groups] == [("a", 1e-2), ("b", 1e-3)]
    before = [p.detach().clone() for p in bank.parameters("c")]
    optimizer = torch.optim.SGD(groups)
    for parameter in [*bank.parameters("a"), *bank.parameters("b")]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(bank.parameters("c"), before, strict=True))


def test_a_batch_of_another_size_is_refused(bank: Bank, batch: Tensor) -> None:
    with bank.rows(["a", "b"]), pytest.raises(RoutingError, match="names 2 rows"):
        logits(bank.model, batch)


def test_names_are_known_and_taken_once(bank: Bank, build_llama: Build) -> None:
    with pytest.raises(AdapterError, match="no adapter 'd'; it has a, b, c"):
        bank.use("d")
    with pytest.raises(AdapterError, match="has an adapter 'a'"):
        bank.add("a", A, seed=0)
    model = build_llama()
    inject(model, A, seed=0)
    with pytest.raises(AdapterError, match="no bank owns"):
        Bank(model)


def test_a_refused_adapter_leaves_the_bank_as_it_was(bank: Bank, batch: Tensor) -> None:
    bank.use("a")
    before = logits(bank.model, batch)
    with pytest.raises(TargetError, match="matches no module"):
        bank.add("d", LoraConfig(r=2, lora_alpha=2, target_modules=("q_prjo",)), seed=0)
    assert bank.names == ["a", "b", "c"] and bank.active == "a"
    assert torch.equal(logits(bank.model, batch), before)


@torch.no_grad()
def test_loaded_and_removed(bank: Bank, build_llama: Build, batch: Tensor, tmp_path: Path) -> None:
    bank.save("b", tmp_path / "b", Identity())
    other = Bank(build_llama())
    other.load("v1.0", tmp_path / "b")  # a name may hold what a module's path may not
    other.use("v1.0")
    bank.use("b")
    assert torch.equal(logits(other.model, batch), logits(bank.model, batch))
    other.remove("v1.0")
    assert other.names == [] and other.active is None
    assert torch.equal(logits(other.model, batch), logits(build_llama(), batch))


@torch.no_grad()
def test_an_adapter_removed_while_another_is_in_use_does_not_come_back(
    bank: Bank, build_llama: Build, batch: Tensor
) -> None:
    bank.use("a")
    with bank.using("b"):
        bank.remove("a")
    assert bank.active is None
    assert torch.equal(logits(bank.model, batch), logits(build_llama(), batch))


def test_no_adapter_is_the_active_one_among_rows(bank: Bank) -> None:
    bank.use("a")
    with bank.rows(["b", "c"]):
        assert bank.active is None
    assert bank.active == "a"


def test_adapters_that_lie_in_each_other_are_refused(bank: Bank, batch: Tensor) -> None:
    """One trains a block's unit whole, another adapts a layer in it: no module could hold both."""
    before = logits(bank.model, batch)
    whole = LoraConfig(
        r=2, lora_alpha=2, target_modules=("v_proj",), modules_to_save=("layers.1.mlp",)
    )
    with pytest.raises(
        AdapterError,
        match=r"adapter 'd' changes model.layers.1.mlp, and another .* model.layers.1.mlp.(down|up)_proj",
    ):
        bank.add("d", whole, seed=0)
    assert bank.names == ["a", "b", "c"]
    assert torch.equal(logits(bank.model, batch), before)


def test_dropout_in_company_drops_as_often_as_alone(bank: Bank) -> None:
    """B is given the identity of A's inputs, so that the update shows which were dropped: 0, or 1/(1 − 0.3) of the input."""
    q_proj, x = bank.model.model.layers[0].self_attn.q_proj, torch.ones(40, 50, 64)
    [layer] = [
        layer for name, layer in _layers(bank, "b") if name == "model.layers.0.self_attn.q_proj"
    ]
    bank.model.train()
    with torch.no_grad(), bank.rows(["b"] * 40):
        layer.train()
        layer.lora_A.zero_()[0, 0] = 1
        layer.lora_B.zero_()[0, 0] = 1 / layer.scale
        update = (bank.model.model.layers[0].self_attn.q_proj(x) - q_proj(x))[..., 0]
    kept = update.abs() > 0.5
    torch.testing.assert_close(
        update[kept], torch.full_like(update[kept], 1 / 0.7), rtol=1e-4, atol=1e-4
    )
    # 2000 draws: the share has a standard deviation of √(0.3 · 0.7 / 2000) = 0.01.
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.05)


def _layers(bank: Bank, name: str) -> list[tuple[str, nn.Module]]:
    with bank.using(name):
        return list(lora_layers(bank.model))
