"""A base is verified in float32, and what products in bfloat16 change is measured and bounded."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core import LoraConfig, inject
from lora_core.layers.linear import keep_product_dtype
from pipelines.errors import BaseModelError
from pipelines.models import measurement
from pipelines.models.measurement import Probe
from pipelines.models.packs import Pack
from pipelines.models.rounding import products_in_float32, verified_with_products
from pipelines.runtime.interfaces.verified import Verified

Family = Callable[..., PreTrainedModel]


def verify(model: PreTrainedModel, pack: Pack) -> Verified:
    inject(model, LoraConfig(r=2, lora_alpha=4), seed=1)
    keep_product_dtype(model)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return verified_with_products(
        model, [Probe(pack, gradient=True)], trained=trained, products=torch.bfloat16
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "mamba"])
def test_the_choice_is_exact_and_the_rounding_is_reported(
    family: Family, examples_pack: Pack, name: str
) -> None:
    found = verify(family(name), examples_pack)
    assert found.path == ("one by one" if name == "mamba" else "packed")
    assert found.loss_difference < 1e-5
    assert found.loss_tolerance == 1e-4
    assert found.rounding is not None
    assert 0 < found.rounding.loss < 0.05
    assert found.rounding.gradient is not None
    assert 0 < found.rounding.gradient < 0.2
    assert "products in 16 bits change the loss by" in str(found)


def test_gradients_that_are_too_large_to_keep_are_not_reported_as_equal(
    family: Family, examples_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("SMALL_TENSOR", "LARGEST_TENSOR"):
        monkeypatch.setattr(measurement, limit, 0)
    found = verify(family("llama"), examples_pack)
    assert found.rounding is not None
    assert found.rounding.gradient is None
    assert found.rounding.loss > 0
    assert "and the gradient by" not in str(found)


class Coarse(nn.Linear):
    """Loses most of its precision under autocast, as a kernel with a mistake would."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            input = input.round()
        return super().forward(input)


def test_more_than_rounding_is_refused(family: Family, examples_pack: Pack) -> None:
    model = family("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Coarse
        layer.mlp.gate_proj.__class__ = Coarse
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",)), seed=1)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    probes = [Probe(examples_pack, gradient=True)]
    with pytest.raises(BaseModelError, match=r"set training\.dtype to float32"):
        verified_with_products(model, probes, trained=trained, products=torch.bfloat16)


def test_4_bit_layers_compute_in_float32_inside_the_block_only() -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16).to("cpu")
    with pytest.raises(ValueError, match="inside"), products_in_float32(nn.ModuleList([layer])):
        assert layer.compute_dtype is torch.float32
        raise ValueError("inside")
    assert layer.compute_dtype is torch.bfloat16
