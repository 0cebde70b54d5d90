"""In a mixed batch every kind of layer computes, and learns, what it does alone on its rows: experts, DoRA, biases, autocast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_core import Bank, LoraConfig, RoutingError
from lora_core.bank.routing import BATCH, TOKENS, routing
from lora_core.layers.linear import LoraLinear

Build = Callable[..., LlamaForCausalLM]
CPU = torch.device("cpu")
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
    """Return a bank whose adapters hold noise."""
    bank = Bank(model)
    for seed, (name, config) in enumerate(configs.items()):
        bank.add(name, config, seed=seed)
        with torch.no_grad():
            for number, parameter in enumerate(bank.parameters(name)):
                parameter.add_(
                    0.1
                    * torch.randn(
                        parameter.shape,
                        generator=torch.Generator().manual_seed(100 * seed + number),
                    )
                )
    return bank


def banks(build_llama: Build) -> dict[str, Callable[[], Bank]]:
    return {
        "experts": lambda: bank_over(make_mixtral(), ON_EXPERTS),
        "dora": lambda: bank_over(build_llama(), DORA),
        "dora with biases in the base": lambda: bank_over(build_llama(bias=True), DORA),
        "biases": lambda: bank_over(build_llama(bias=True), BIASES),
        "starts from the weight": lambda: bank_over(build_llama(), SPECTRAL),
    }


KINDS = ["experts", "dora", "dora with biases in the base", "biases", "starts from the weight"]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 101, (len(ROWS), 7), generator=torch.Generator().manual_seed(8))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def own_rows(name: str | None) -> list[int]:
    return [place for place, one in enumerate(ROWS) if one == name]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_each_adapter_alone(
    build_llama: Build, ids: Tensor, kind: str
) -> None:
    bank = banks(build_llama)[kind]()
    with bank.rows(ROWS):
        mixed = logits(bank.model, ids)
        (mixed**2).sum().backward()
    together = {
        name: [taken(parameter) for parameter in bank.parameters(name)] for name in bank.names
    }
    for name in (None, *bank.names):
        with bank.using(name):
            alone = logits(bank.model, ids[own_rows(name)])
        # The same products in float32, of matrices with another number of rows.
        torch.testing.assert_close(mixed[own_rows(name)], alone, rtol=1e-5, atol=2e-5)
        if name is not None:
            (alone**2).sum().backward()
            for found, parameter in zip(together[name], bank.parameters(name), strict=True):
                assert found.abs().max() > 1e-3  # a gradient of nothing would agree with anything
                torch.testing.assert_close(
                    found,
                    parameter.grad,
                    rtol=1e-4,
                    atol=1e-5 * parameter.grad.abs().max().item() + 1e-6,
                )


@pytest.mark.parametrize(
    "names", [["a", "a", "b", None], ["b", "a", None, "b"]], ids=["together", "scattered"]
)
@pytest.mark.parametrize("dim", [BATCH, TOKENS])
def test_gradients_pass_what_was_dropped(
    build_llama: Build, names: list[str | None], dim: int
) -> None:
    """Against differences of float64, with the same draw in every call."""
    configs = {
        name: LoraConfig(r=2, lora_alpha=3, target_modules=("q_proj",), lora_dropout=0.4)
        for name in "ab"
    }
    bank = bank_over(build_llama().double().train(), configs)
    for name in configs:
        with bank.using(name):
            bank.model.train().double()
    parameters = [
        parameter
        for name in configs
        for parameter in bank.parameters(name)
        if parameter.shape[-1] == 2
    ][:2]
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
        assert torch.autograd.gradcheck(drawn, (x, *parameters))


def taken(parameter: nn.Parameter) -> Tensor:
    grad, parameter.grad = parameter.grad, None
    assert grad is not None
    return grad


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_differ_on_every_row(build_llama: Build, ids: Tensor, kind: str) -> None:
    """Without this the law above could hold of adapters that do nothing."""
    bank = banks(build_llama)[kind]()
    with bank.rows(ROWS):
        mixed = logits(bank.model, ids)
    base = logits(bank.model, ids)
    differences = (mixed - base).abs().amax(dim=(1, 2))
    assert all(
        difference > 0.01 for difference, name in zip(differences, ROWS, strict=True) if name
    )


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_tokens_of_the_base_keep_its_kernel(ids: Tensor, kernel: str) -> None:
    bank = bank_over(make_mixtral(kernel=kernel), ON_EXPERTS)
    with bank.rows(ROWS):
        mixed = logits(bank.model, ids)
    for name in (None, *bank.names):
        with bank.using(name):
            torch.testing.assert_close(
                mixed[own_rows(name)], logits(bank.model, ids[own_rows(name)]), rtol=1e-5, atol=2e-5
            )


@torch.no_grad()
@pytest.mark.parametrize("examples", [1, 2])
def test_stretches_of_a_pack_reach_their_experts(examples: int) -> None:
    """Rows along the tokens, of one pack and of two packs laid out alike."""
    block = (bank := bank_over(make_mixtral(), ON_EXPERTS)).model.model.layers[0].mlp
    x = torch.randn(examples, 9, 32)
    with bank.rows(["a", None, "b"], dim=TOKENS, lengths=[4, 2, 3]):
        mixed = block(x)
    for name, part in (("a", slice(0, 4)), (None, slice(4, 6)), ("b", slice(6, 9))):
        with bank.using(name):
            torch.testing.assert_close(
                mixed[:, part], block(x[:, part].contiguous()), rtol=1e-5, atol=1e-5
            )


def test_experts_are_held_to_the_rows_of_the_batch(ids: Tensor) -> None:
    """Two rows are named and four come: eight tokens flat would divide by two as well."""
    bank = bank_over(make_mixtral(), {"b": ON_EXPERTS["b"]})
    with bank.rows(["b", None]), pytest.raises(RoutingError, match=r"names 2 rows .* has 4"):
        logits(bank.model, ids[:4])
    with bank.rows(["b", None]):
        experts = bank.model.model.layers[0].mlp.experts
        with pytest.raises(RoutingError, match="2 rows and 7 tokens"):
            experts(torch.randn(7, 32), torch.zeros(7, 2, dtype=torch.long), torch.ones(7, 2))
        with pytest.raises(RoutingError, match="holds its features there"):
            bank.model.model.layers[0].mlp(torch.randn(2))
    logits(bank.model, ids[:4])  # outside, nothing is asked


@torch.no_grad()
def test_no_token_is_an_answer_too() -> None:
    bank = bank_over(make_mixtral(), ON_EXPERTS)
    with bank.rows(["a", "b"]):
        experts = bank.model.model.layers[0].mlp.experts
        assert experts(
            torch.randn(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.ones(0, 2)
        ).shape == (0, 32)


def test_rows_along_the_features_are_refused(build_llama: Build) -> None:
    """64 tokens of a flat pack and 64 features: by its size alone the input would do."""
    bank = bank_over(build_llama(), {"c": DORA["c"]})
    with (
        bank.rows(["c", None], dim=TOKENS, lengths=[32, 32]),
        pytest.raises(RoutingError, match="holds its features there"),
    ):
        bank.model.model.layers[0].self_attn.q_proj(torch.randn(64, 64))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], {"dim": 2}, "cannot lie along dimension 2"),
        (["a", None], {"lengths": [3]}, r"lengths=\[3\] do not fit 2 names"),
        (["a", None], {"lengths": []}, r"lengths=\[\] do not fit 2 names"),
        (["a", None], {"lengths": [3, -1]}, "none below 0"),
        ([], {}, "not all 0"),
    ],
)
def test_a_routing_that_means_nothing_is_refused(
    names: list[str | None], options: dict[str, object], message: str
) -> None:
    with pytest.raises(RoutingError, match=message):
        routing(names, **options)


def test_tokens_of_rows() -> None:
    """By hand: rows 0 and 2 of three rows of two tokens; places 0 and 2 of two packs of three tokens."""
    assert routing(["a", None, "a"], dim=BATCH).tokens("a", 6, CPU).tolist() == [0, 1, 4, 5]
    assert routing(["a", None, "a"], dim=TOKENS).tokens("a", 6, CPU).tolist() == [0, 2, 3, 5]


# --- one product for all ---


@contextmanager
def counted(kind: type[nn.Module]) -> Iterator[list[nn.Module]]:
    """Record the calls of the modules of a kind in a block."""
    calls: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: calls.append(module) if isinstance(module, kind) else None
    )
    yield calls
    hook.remove()


@torch.no_grad()
def test_dora_shares_the_product_of_the_base(build_llama: Build, ids: Tensor) -> None:
    bank = bank_over(build_llama(), DORA)
    with bank.rows(ROWS), counted(LoraLinear) as calls:
        logits(bank.model, ids)
    assert not calls


# --- autocast ---


@pytest.mark.parametrize("configs", [DORA, BIASES], ids=["dora", "biases"])
def test_autocast_is_that_of_each_adapter_alone(
    build_llama: Build, ids: Tensor, configs: dict[str, LoraConfig]
) -> None:
    bank = bank_over(build_llama(bias=True), configs)
    check_under_autocast(bank, ids)


def test_autocast_reaches_experts(ids: Tensor) -> None:
    check_under_autocast(bank_over(make_mixtral(), ON_EXPERTS), ids)


def check_under_autocast(bank: Bank, ids: Tensor) -> None:
    """Compute in bfloat16, learn in float32: rows and gradients are near those of float32, and not equal to them."""
    with bank.rows(ROWS):
        exact = logits(bank.model, ids)
        (exact**2).mean().backward()
        wanted = {
            name: [taken(parameter) for parameter in bank.parameters(name)] for name in bank.names
        }
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(bank.model, ids)
        (found.float() ** 2).mean().backward()
    assert 0 < relative(found, exact) < 0.05  # two blocks of products, each input rounded to 8 bits
    for name in bank.names:
        for grad, parameter in zip(wanted[name], bank.parameters(name), strict=True):
            assert parameter.grad is not None
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            assert relative(parameter.grad, grad) < 0.1


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_row_of_the_base_has_its_dtype_under_autocast(
    build_llama: Build, build_nf4_llama: Build, quantized: bool
) -> None:
    bank = bank_over(build_nf4_llama() if quantized else build_llama(), {"c": DORA["c"]})
    q_proj, x = bank.model.model.layers[0].self_attn.q_proj, torch.randn(2, 3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = q_proj(x)
        with bank.rows(["c", None]):
            found = bank.model.model.layers[0].self_attn.q_proj(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found[1], expected[1])
