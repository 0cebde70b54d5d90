"""In a mixed batch each kind of layer computes and learns what it does alone on its rows.

Covered are experts, DoRA, biases, spectral initialization and autocast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_core import Bank, LoraConfig, RoutingError
from lora_core.bank.routing import BATCH, TOKENS
from lora_core.layers.linear import LoraLinear

Build = Callable[..., LlamaForCausalLM]
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


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 101, (len(ROWS), 7), generator=torch.Generator().manual_seed(8))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def own_rows(name: str | None) -> list[int]:
    return [index for index, owner in enumerate(ROWS) if owner == name]


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


def pop_gradients(bank: Bank, name: str) -> list[Tensor]:
    """Return the gradients of an adapter, and reset them."""
    gradients: list[Tensor] = []
    for parameter in bank.parameters(name):
        assert parameter.grad is not None
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


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
        assert torch.autograd.gradcheck(drawn, (x, *factors_b[:2]))


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


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_tokens_of_the_base_use_its_kernel(ids: Tensor, kernel: str) -> None:
    bank = bank_over(make_mixtral(kernel=kernel), ON_EXPERTS)
    with bank.rows(ROWS):
        mixed = logits(bank.model, ids)
    for name in (None, *bank.names):
        rows = own_rows(name)
        with bank.using(name):
            expected = logits(bank.model, ids[rows])
        torch.testing.assert_close(mixed[rows], expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("examples", [1, 2])
def test_segments_of_a_pack_reach_their_experts(examples: int) -> None:
    """Rows are routed along the tokens, of one pack and of two packs with the same layout."""
    bank = bank_over(make_mixtral(), ON_EXPERTS)
    block = bank.model.model.layers[0].mlp
    x = torch.randn(examples, 9, 32)
    with bank.rows(["a", None, "b"], dim=TOKENS, lengths=[4, 2, 3]):
        mixed = block(x)
    for name, part in (("a", slice(0, 4)), (None, slice(4, 6)), ("b", slice(6, 9))):
        with bank.using(name):
            expected = block(x[:, part].contiguous())
        torch.testing.assert_close(mixed[:, part], expected, rtol=1e-5, atol=1e-5)


def test_experts_require_the_routed_rows_of_the_batch(ids: Tensor) -> None:
    """Two rows are routed and four arrive: their flattened tokens are divisible by two as well."""
    bank = bank_over(make_mixtral(), {"b": ON_EXPERTS["b"]})
    with bank.rows(["b", None]), pytest.raises(RoutingError, match=r"names 2 rows, but .* has 4"):
        logits(bank.model, ids[:4])
    with bank.rows(["b", None]):
        experts = bank.model.model.layers[0].mlp.experts
        with pytest.raises(RoutingError, match="2 rows, but 7 tokens"):
            experts(torch.randn(7, 32), torch.zeros(7, 2, dtype=torch.long), torch.ones(7, 2))
        with pytest.raises(RoutingError, match="has its features there"):
            bank.model.model.layers[0].mlp(torch.randn(2))
    logits(bank.model, ids[:4])  # outside the block nothing is checked


@torch.no_grad()
def test_experts_accept_zero_tokens() -> None:
    bank = bank_over(make_mixtral(), ON_EXPERTS)
    with bank.rows(["a", "b"]):
        experts = bank.model.model.layers[0].mlp.experts
        indices = torch.zeros(0, 2, dtype=torch.long)
        assert experts(torch.randn(0, 32), indices, torch.ones(0, 2)).shape == (0, 32)


def test_rows_along_the_features_are_refused(build_llama: Build) -> None:
    """The 64 tokens of a flat pack and the 64 features have the same size."""
    bank = bank_over(build_llama(), {"c": DORA["c"]})
    with (
        bank.rows(["c", None], dim=TOKENS, lengths=[32, 32]),
        pytest.raises(RoutingError, match="has its features there"),
    ):
        bank.model.model.layers[0].self_attn.q_proj(torch.randn(64, 64))


# --- one shared product ---


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


# --- autocast ---


@pytest.mark.parametrize("configs", [DORA, BIASES], ids=["dora", "biases"])
def test_autocast_works_on_linear_layers(
    build_llama: Build, ids: Tensor, configs: dict[str, LoraConfig]
) -> None:
    bank = bank_over(build_llama(bias=True), configs)
    check_under_autocast(bank, ids)


def test_autocast_works_on_experts(ids: Tensor) -> None:
    check_under_autocast(bank_over(make_mixtral(), ON_EXPERTS), ids)


def check_under_autocast(bank: Bank, ids: Tensor) -> None:
    """Compute in bfloat16 and learn in float32: the results are close to float32's, not equal."""
    with bank.rows(ROWS):
        exact = logits(bank.model, ids)
        (exact**2).mean().backward()
        expected = {name: pop_gradients(bank, name) for name in bank.names}
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(bank.model, ids)
        (found.float() ** 2).mean().backward()
    # Two blocks of products, with each input rounded to 8 bits.
    assert 0 < relative_error(found, exact) < 0.05
    for name in bank.names:
        assert all(parameter.dtype == torch.float32 for parameter in bank.parameters(name))
        for gradient, reference in zip(pop_gradients(bank, name), expected[name], strict=True):
            assert gradient.dtype == torch.float32
            assert relative_error(gradient, reference) < 0.1


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = found.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_row_of_the_base_has_its_dtype_under_autocast(
    build_llama: Build, build_nf4_llama: Build, quantized: bool
) -> None:
    model = build_nf4_llama() if quantized else build_llama()
    bank = bank_over(model, {"c": DORA["c"]})
    q_proj = bank.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = q_proj(x)
        with bank.rows(["c", None]):
            found = bank.model.model.layers[0].self_attn.q_proj(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found[1], expected[1])
