"""Under autocast a mixed batch computes in bfloat16 and learns in float32."""

from collections.abc import Callable

import pytest
import torch
from mixed_banks import (
    BIASES,
    DORA,
    ON_EXPERTS,
    ROWS,
    bank_over,
    logits,
    make_mixtral,
    pop_gradients,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from lora_core import Bank, LoraConfig

Build = Callable[..., LlamaForCausalLM]


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
