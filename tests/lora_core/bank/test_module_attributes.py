"""While rows are routed, models read attributes of the base's modules: sizes, dtypes, settings."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from lora_core import Bank, LoraConfig, RoutingError

NAMES = ("first", "second", None)


def trained_bank(model: nn.Module, targets: tuple[str, ...]) -> Bank:
    bank = Bank(model)
    for seed, name in enumerate(NAMES[:2]):
        bank.add(name, LoraConfig(r=2, lora_alpha=4, target_modules=targets), seed=seed)
        for parameter in bank.parameters(name):
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return bank


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_rows_over_t5_equal_each_adapter_alone(feed_forward: str) -> None:
    """T5 reads the dtype of the weight of `wo` before each call."""
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj=feed_forward,
    )
    model = T5ForConditionalGeneration(config).eval()
    bank = trained_bank(model, ("q", "wo", "wi", "shared")[: 2 if "gated" in feed_forward else 3])
    tokens = torch.arange(18).view(3, 6)

    def logits(rows: Tensor) -> Tensor:
        output: Tensor = model(input_ids=rows, decoder_input_ids=rows).logits
        return output

    with torch.no_grad():
        with bank.rows(NAMES):
            mixed = logits(tokens)
        for row, name in enumerate(NAMES):
            with bank.using(name):
                alone = logits(tokens[row : row + 1])
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-5)
    assert (mixed - logits(tokens)).abs().amax(dim=(1, 2))[:2].min() > 0.01


class Reading(nn.Module):
    """Computes with a layer's weight instead of calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


def test_product_with_the_weight_of_mixed_rows_raises() -> None:
    """No single weight computes rows of several adapters, so none may be used silently."""
    model = Reading()
    bank = trained_bank(model, ("layer",))
    with bank.rows(NAMES), pytest.raises(RoutingError, match="no one weight is right"):
        model(torch.randn(3, 8))


def test_mixed_modules_have_the_attributes_of_the_base() -> None:
    model: Any = nn.ModuleDict(
        {"linear": nn.Linear(8, 4, dtype=torch.float64), "table": nn.Embedding(10, 8)}
    )
    bank = trained_bank(model, ("linear", "table"))
    with bank.rows(NAMES):
        linear, table = model["linear"], model["table"]
        assert (linear.in_features, linear.out_features) == (8, 4)
        assert linear.weight.dtype == linear.bias.dtype == torch.float64
        assert linear.weight.shape == (4, 8)
        assert linear.weight.device.type == "cpu" and linear.weight.is_floating_point()
        assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (10, 8, None)
        with pytest.raises(AttributeError, match="absent"):
            _ = linear.absent
