"""In a mixed batch each kind of layer computes and learns what it does alone on its rows.

Covered are experts, DoRA, biases and spectral initialization.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from mixed_banks import (
    BIASES,
    DORA,
    ON_EXPERTS,
    ROWS,
    SPECTRAL,
    bank_over,
    logits,
    make_mixtral,
    own_rows,
    pop_gradients,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import Bank, LoraConfig, RoutingError
from lora_core.bank.routing import BATCH, TOKENS
from lora_core.layers.linear import LoraLinear

Build = Callable[..., LlamaForCausalLM]


def bank_of(kind: str, build_llama: Build) -> Bank:
    if kind == "experts":
        return bank_over(make_mixtral(), ON_EXPERTS)
    if kind == "dora":
        return bank_over(build_llama(), DORA)
    if kind == "dora with biases in the base":
        return bank_over(build_llama(bias=True), DORA)
    if kind == "biases":
        return bank_over(build_llama(bias=True), BIASES)
    return bank_over(build_llama(), SPECTRAL)


each_kind = pytest.mark.parametrize(
    "kind", ["experts", "dora", "dora with biases in the base", "biases", "spectral"]
)


@each_kind
def test_logits_and_gradients_are_those_of_each_adapter_alone(
    build_llama: Build, ids: Tensor, kind: str
) -> None:
    bank = bank_of(kind, build_llama)
    with bank.rows(ROWS):
        mixed = logits(bank.model, ids)
        (mixed**2).sum().backward()
    together = {name: pop_gradients(bank, name) for name in bank.names}
    for name in (None, *bank.names):
        with bank.using(name):
            alone = logits(bank.model, ids[own_rows(name)])
        # The same products in float32, of matrices with another number of rows.
        torch.testing.assert_close(mixed[own_rows(name)], alone, rtol=1e-5, atol=2e-5)
        if name is not None:
            (alone**2).sum().backward()
            for found, expected in zip(together[name], pop_gradients(bank, name), strict=True):
                assert found.abs().max() > 1e-3  # zero gradients would agree trivially
                atol = 1e-5 * expected.abs().max().item() + 1e-6
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(
    "names", [["a", "a", "b", None], ["b", "a", None, "b"]], ids=["together", "scattered"]
)
@pytest.mark.parametrize("dim", [BATCH, TOKENS])
def test_gradients_respect_dropout(build_llama: Build, names: list[str | None], dim: int) -> None:
    """Compare with finite differences in float64, with the same draw in every call."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=("q_proj",), lora_dropout=0.4)
    configs = {"a": config, "b": config}
    bank = bank_over(build_llama().double().train(), configs)
    for name in configs:
        with bank.using(name):
            bank.model.train().double()
    all_parameters = [*bank.parameters("a"), *bank.parameters("b")]
    factors_b = [parameter for parameter in all_parameters if parameter.shape[-1] == 2]
    x = torch.randn(4, 4, 64, dtype=torch.float64, requires_grad=True)
    with bank.rows(names, dim=dim):
        q_proj = bank.model.model.layers[0].self_attn.q_proj

        def drawn(x: Tensor, *_: Tensor) -> Tensor:
            torch.manual_seed(3)
            y: Tensor = q_proj(x)
            return y[..., :3]

        dropped = drawn(x)
        bank.model.eval()
        assert not torch.allclose(dropped, drawn(x))
        bank.model.train()
        assert torch.autograd.gradcheck(drawn, (x, *factors_b[:2]), fast_mode=True)


@torch.no_grad()
@each_kind
def test_the_adapters_differ_on_every_row(build_llama: Build, ids: Tensor, kind: str) -> None:
    """Otherwise the invariant above could hold for adapters without effect."""
    bank = bank_of(kind, build_llama)
    with bank.rows(ROWS):
        mixed = logits(bank.model, ids)
    base = logits(bank.model, ids)
    differences = (mixed - base).abs().amax(dim=(1, 2))
    for difference, name in zip(differences, ROWS, strict=True):
        assert name is None or difference > 0.01


def test_rows_along_the_features_are_refused(build_llama: Build) -> None:
    """The 64 tokens of a flat pack and the 64 features have the same size."""
    bank = bank_over(build_llama(), {"c": DORA["c"]})
    with (
        bank.rows(["c", None], dim=TOKENS, lengths=[32, 32]),
        pytest.raises(RoutingError, match="has its features there"),
    ):
        bank.model.model.layers[0].self_attn.q_proj(torch.randn(64, 64))


@contextmanager
def recorded_calls(kind: type[nn.Module]) -> Iterator[list[nn.Module]]:
    """Record the forward calls of all modules of a class inside a block."""
    calls: list[nn.Module] = []

    def record(module: nn.Module, _: object) -> None:
        if isinstance(module, kind):
            calls.append(module)

    hook = nn.modules.module.register_module_forward_pre_hook(record)
    yield calls
    hook.remove()


@torch.no_grad()
def test_dora_shares_the_product_of_the_base(build_llama: Build, ids: Tensor) -> None:
    bank = bank_over(build_llama(), DORA)
    with bank.rows(ROWS), recorded_calls(LoraLinear) as calls:
        logits(bank.model, ids)
    assert not calls
