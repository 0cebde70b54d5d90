"""One set of invariants for every storage: 16-bit dense, NF4 and FP4 with single or double
quantization, int8.

The references are bitsandbytes' own layers and decoders, dense products in float64, and PEFT.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from storages import CONFIG, IN, OUT, SCALE, STORAGES, Storage, decoded, linear, loaded
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import (
    BaseMismatchError,
    Identity,
    LoraConfig,
    TargetError,
    fingerprint,
    inject,
    load_adapter,
    save_adapter,
)
from lora_core.base.quant import base_weight

Logits = Callable[[nn.Module], Tensor]
Noise = Callable[[nn.Module], None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES.keys())
each_quantized = pytest.mark.parametrize(
    "storage", [s for s in STORAGES.values() if s.kind != "dense"], ids=list(STORAGES)[2:]
)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])


def adapted(layer: nn.Module, randomize: Noise) -> nn.Module:
    model = nn.ModuleDict({"fc": copy.deepcopy(layer)})
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=("fc",)), seed=0)
    randomize(model)
    return model["fc"]


@each_storage
@each_mode
def test_step_zero_is_the_base_bit_for_bit(
    llama_folder: Path, logits: Logits, storage: Storage, training: bool
) -> None:
    model = loaded(llama_folder, storage).train(training)
    before = logits(model)
    targets = inject(model, CONFIG, seed=0)
    assert [target.kind for target in targets] == [storage.kind] * 14
    assert torch.equal(logits(model), before)


@each_storage
@each_mode
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_step_zero_of_a_layer_is_the_base(
    randomize: Noise, storage: Storage, training: bool, bias: bool
) -> None:
    base = linear(storage, bias=bias).train(training)
    layer = adapted(base, randomize).train(training)
    nn.init.zeros_(layer.lora_B)
    x = 2 * torch.randn(2, 5, IN, dtype=storage.dtype)
    assert torch.equal(layer(x), base(x))


@each_storage
@each_mode
def test_forward_and_gradients_match_the_decoded_weight(
    randomize: Noise, storage: Storage, training: bool
) -> None:
    base = linear(storage)
    dense = decoded(base)
    layer = adapted(base, randomize).train(training)
    x = torch.randn(3, 5, IN).to(storage.dtype).requires_grad_()
    inputs = (x, layer.lora_A, layer.lora_B)
    exact_x, a, b = (tensor.detach().double().requires_grad_() for tensor in inputs)
    update = F.linear(F.linear(exact_x, a), b)
    expected = F.linear(exact_x, dense, base.bias.double()) + SCALE * update
    upstream = torch.randn(3, 5, OUT).to(storage.dtype)
    y = layer(x)
    found = torch.autograd.grad(y, inputs, upstream)
    reference = torch.autograd.grad(expected, (exact_x, a, b), upstream.double())
    # Sums of at most 100 terms of about 1: some ten unit roundoffs, of 6e-8, 5e-4 or 4e-3, of
    # their largest value.
    unit = torch.finfo(storage.dtype).eps / 2
    for gradient, exact in zip(found, reference, strict=True):
        atol = 20 * unit * exact.abs().max().item()
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=atol)
    allowed = 20 * unit * expected.abs().max() + torch.zeros_like(expected)
    if storage.kind == "int8" and not training:
        # Each input is rounded to float16 and then to 1/254 of the largest value of its row.
        largest = exact_x.detach().abs().amax(dim=-1, keepdim=True)
        allowed = allowed + (largest / 254 + largest * 2.0**-11) * dense.abs().sum(dim=1)
    assert ((y.double() - expected).abs() <= allowed).all()


@each_storage
def test_base_weight_decodes_as_bitsandbytes_does(storage: Storage) -> None:
    layer = linear(storage)
    weight = base_weight(layer)
    assert weight is not None
    assert weight.kind == storage.kind
    assert weight.shape == (OUT, IN)
    assert weight.stored is layer.weight
    dense = weight.dense(torch.float32).double()
    # Two roundings to float32.
    torch.testing.assert_close(dense, decoded(layer), rtol=2e-7, atol=0)
    assert weight.dense(torch.bfloat16).dtype == torch.bfloat16


@each_quantized
def test_an_adapter_saved_and_loaded_on_the_same_base_is_the_same(
    llama_folder: Path, logits: Logits, randomize: Noise, tmp_path: Path, storage: Storage
) -> None:
    model = loaded(llama_folder, storage).eval()
    before = fingerprint(model)
    inject(model, CONFIG, seed=0)
    randomize(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", CONFIG, Identity(base="tiny"))
    again = loaded(llama_folder, storage).eval()
    assert fingerprint(again) == fingerprint(model) == before
    assert before[0] == storage.kind
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


def test_each_kind_has_a_separate_fingerprint(llama_folder: Path, tmp_path: Path) -> None:
    found = {fingerprint(loaded(llama_folder, storage)) for storage in STORAGES.values()}
    assert {kind for kind, _ in found} == {"dense", "nf4", "fp4", "int8"}
    dense = {digest for kind, digest in found if kind == "dense"}
    # A copy in float16 is rounded twice, to float16 and to bfloat16; loading compares both.
    assert len(dense) == 2
    # Double quantization quantizes the scales and changes no code.
    assert len(found) - len(dense) == 3
    model = loaded(llama_folder, STORAGES["fp4"])
    inject(model, CONFIG, seed=0)
    save_adapter(model, tmp_path / "adapter", CONFIG, Identity(base="tiny"))
    with pytest.raises(BaseMismatchError, match="int8"):
        load_adapter(loaded(llama_folder, STORAGES["int8"]), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["int8", "int8 outliers", "fp4", "fp4 double"])
def test_peft_loads_ours_and_we_load_peft(
    llama_folder: Path, logits: Logits, randomize: Noise, tmp_path: Path, name: str
) -> None:
    storage = STORAGES[name]
    model = loaded(llama_folder, storage).eval()
    plain = logits(model)
    inject(model, CONFIG, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "ours", CONFIG, Identity(base="tiny"))
    theirs = PeftModel.from_pretrained(loaded(llama_folder, storage), tmp_path / "ours").eval()
    # The same products in float32, summed in another order; where an input of the next layer is
    # rounded to 8 bits, a sum at the edge can round differently: one step of 127 in 1 of 64 terms.
    relative = 2e-2 if storage.kind == "int8" else 1e-5
    tolerance = {"rtol": 0, "atol": relative * plain.abs().max().item()}
    torch.testing.assert_close(logits(theirs), logits(model), **tolerance)
    assert (logits(model) - plain).abs().max() > 0.3 * plain.abs().max()
    config = PeftLoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft_model = get_peft_model(loaded(llama_folder, storage), config)
    peft_model.save_pretrained(tmp_path / "theirs")
    again = loaded(llama_folder, storage).eval()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(peft_model.eval()), **tolerance)


def test_an_8_bit_layer_that_stores_its_full_weight_is_refused() -> None:
    with pytest.raises(TargetError, match="has_fp16_weights=True"):
        base_weight(bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True))
