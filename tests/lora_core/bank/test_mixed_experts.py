"""In a mixed batch each token reaches the experts of its adapter, and the batch is checked."""

import pytest
import torch
from mixed_banks import ON_EXPERTS, ROWS, bank_over, logits, make_mixtral, own_rows
from torch import Tensor

from lora_core import RoutingError
from lora_core.bank.routing import TOKENS


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
