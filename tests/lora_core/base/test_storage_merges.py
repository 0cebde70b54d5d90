"""A merge into each quantized storage: what is refused, and what a forced merge stores.

The references are bitsandbytes' own quantizer and decoder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from storages import CONFIG, IN, SCALE, STORAGES, decoded, linear, loaded
from torch import nn

from lora_core import LoraConfig, MergeError, inject, lora_layers, merge, unmerge
from lora_core.merging.dequantize import dequantize

Noise = Callable[[nn.Module], None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.mark.parametrize("force", [False, True])
def test_a_merge_into_int8_is_refused(
    llama_folder: Path, refuses: Callable[..., None], force: bool
) -> None:
    model = loaded(llama_folder, STORAGES["int8"])
    inject(model, CONFIG, seed=0)
    refuses(model, lambda: merge(model, force=force), MergeError, "q_proj is stored in int8")


@pytest.mark.parametrize("name", ["fp4", "fp4 double", "nf4"])
def test_a_forced_merge_quantizes_the_sum_as_bitsandbytes_does(randomize: Noise, name: str) -> None:
    """The retained fraction is computed with bitsandbytes' decoder."""
    storage = STORAGES[name]
    base = linear(storage)
    model = nn.ModuleDict({"fc": base})
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("fc",)), seed=0)
    randomize(model)
    x = torch.randn(5, IN)
    before = model["fc"](x)
    delta = model["fc"].delta()
    dense = decoded(base).float()
    with pytest.raises(MergeError, match=f"fc is stored in {storage.kind}"):
        merge(model)
    merged = merge(model, force=True)
    codes, state = quantize_4bit(
        dense + delta, blocksize=64, compress_statistics=storage.double, quant_type=storage.kind
    )
    weight = model["fc"].weight
    assert torch.equal(weight.data, codes)
    assert weight.quant_state.quant_type == weight.quant_type == storage.kind
    assert weight.quant_state.nested is storage.double
    realized = (dequantize_4bit(codes, state) - dense).double()
    expected = (realized * delta).sum() / (delta.double() ** 2).sum()
    assert merged.retention["fc"].fraction == pytest.approx(
        expected.item(), rel=1e-6
    )  # summed in float64 both times
    unmerge(model, merged)
    assert torch.equal(model["fc"](x), before)


@pytest.mark.parametrize(
    "settings",
    [{"bias": "lora_only"}, {"lora_bias": True}, {"bias": "lora_only", "use_dora": True}],
    ids=str,
)
def test_a_forced_merge_includes_the_trained_bias(settings: dict[str, Any]) -> None:
    base = linear(STORAGES["nf4"])
    model = nn.ModuleDict({"fc": base})
    own = base.bias.detach().clone()
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("fc",), **settings), seed=0)
    trained = model["fc"].trained_bias if "bias" in settings else model["fc"].lora_bias
    with torch.no_grad():
        trained.add_(0.5)
    merged = merge(model, force=True)
    assert torch.equal(model["fc"].bias, own + 0.5 * (1 if "bias" in settings else SCALE))
    unmerge(model, merged)
    assert torch.equal(base.bias, own)


def test_a_forced_merge_with_spectral_initialization_adds_the_update(
    llama_folder: Path, randomize: Noise
) -> None:
    model = nn.ModuleDict({"fc": linear(STORAGES["nf4"])})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("fc",), init_lora_weights="pissa")
    inject(model, config, seed=0)
    randomize(model)
    total = decoded(model["fc"].base).float() + model["fc"].delta()
    merge(model, force=True)
    codes, _ = quantize_4bit(total, blocksize=64, compress_statistics=False, quant_type="nf4")
    assert torch.equal(model["fc"].weight.data, codes)


def test_dequantizing_does_not_change_adapters_over_int8(randomize: Noise) -> None:
    model = nn.ModuleDict(
        {"eight": linear(STORAGES["int8"]), "four": linear(STORAGES["fp4"])}
    ).eval()
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("eight", "four")), seed=0)
    randomize(model)
    x = torch.randn(5, IN)
    before = {name: layer(x) for name, layer in model.items()}
    assert dequantize(model, torch.float32) == 1
    assert [layer.frozen.kind for _, layer in lora_layers(model)] == ["int8", "dense"]
    for name, layer in model.items():
        assert torch.equal(layer(x), before[name])
