"""Adapters of experts have the keys, shapes and logits of PEFT's, and load in both directions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapted_mixtral import (
    BOTH,
    DOWN,
    GATE_UP,
    RANK,
    adapt,
    each_choice,
    experts_of,
    make_layer,
    make_mixtral,
    peft_config,
    shapes_of,
    tensors_of,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.layers.expert_layout import adapter_shapes

Logits = Callable[[nn.Module], Tensor]

# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@each_choice
def test_peft_loads_our_adapter_with_the_same_logits(
    logits: Logits, tmp_path: Path, names: tuple[str, ...]
) -> None:
    model = adapt(make_mixtral(), names)
    tensors = {key: tensor.detach() for key, tensor in tensors_of(model).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config(names).save_pretrained(tmp_path)
    # Warnings, such as that of a missing key, are errors here.
    theirs = PeftModel.from_pretrained(make_mixtral(), tmp_path).eval()
    # PEFT adds B·A to W and multiplies once, in float32.
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(make_mixtral())).abs().max() > 0.1
    merged = theirs.merge_and_unload()
    for path, layer in experts_of(model).items():
        for name, total in layer.merged_tensors().items():
            reference = merged.get_submodule(path).get_parameter(name)
            torch.testing.assert_close(reference, total, rtol=1e-6, atol=1e-6)


@each_choice
def test_peft_adapter_loads_with_the_same_logits(
    logits: Logits, tmp_path: Path, names: tuple[str, ...]
) -> None:
    theirs = get_peft_model(make_mixtral(), peft_config(names)).eval()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    model = adapt(make_mixtral(), names, noise=False)
    expected = tensors_of(model)
    assert shapes_of(tensors) == shapes_of(expected)
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(make_mixtral())).abs().max() > 0.1


@each_choice
def test_shapes_need_no_weights(names: tuple[str, ...]) -> None:
    with torch.device("meta"):
        base = make_mixtral()
    experts = base.get_submodule("model.layers.0.mlp.experts")
    found = adapter_shapes(experts, dict.fromkeys(reversed(names), RANK))
    assert list(found.items()) == list(shapes_of(make_layer(names).adapter_tensors()).items())


def test_keys_are_pefts() -> None:
    deeper = ["base_layer.lora_A.weight", "base_layer.lora_B.weight"]
    plain = ["lora_A.weight", "lora_B.weight"]
    assert list(make_layer(BOTH).adapter_tensors()) == deeper + plain
    assert list(make_layer(GATE_UP).adapter_tensors()) == plain
    assert list(make_layer(DOWN).adapter_tensors()) == plain
