"""Keys of other layouts become those that PEFT writes now; nothing else about them changes."""

import pytest
import torch

from lora_core.adapter.key_layouts import plain_layout
from lora_core.errors import AdapterError

PREFIX = "base_model.model."
LAYER = "model.layers.0.self_attn.q_proj"
PRESENT = [
    f"{PREFIX}{LAYER}.lora_A.weight",
    f"{PREFIX}{LAYER}.lora_B.weight",
    f"{PREFIX}{LAYER}.lora_magnitude_vector",
    f"{PREFIX}model.embed_tokens.lora_embedding_A",
    f"{PREFIX}lm_head.weight",
    f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_A.weight",
]
LAYOUTS = {
    "present": (lambda key: key, 0),
    "data parallel": (lambda key: f"module.{key}", 1),
    "no prefix": (lambda key: key.removeprefix(PREFIX), 1),
    "twice": (lambda key: f"{PREFIX}{key}", 1),
    "compiled": (lambda key: key.replace("model.layers.0.", "model.layers.0._orig_mod."), 1),
    "named": (
        lambda key: (
            key.replace("lora_A.", "lora_A.mine.")
            .replace("lora_B.", "lora_B.mine.")
            .replace("lora_magnitude_vector", "lora_magnitude_vector.mine.weight")
            .replace("lora_embedding_A", "lora_embedding_A.mine")
        ),
        2,
    ),
    "everything": (
        lambda key: (
            "module."
            + key.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace(
                "lora_A.weight", "lora_A.default.weight"
            )
        ),
        2,
    ),
}


@pytest.mark.parametrize(("rename", "changes"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_keys_become_pefts(rename, changes: int) -> None:
    tensors = {rename(key): torch.full((2,), float(i)) for i, key in enumerate(PRESENT)}
    found = plain_layout(tensors, "file")
    assert list(found.tensors) == PRESENT
    assert [int(each[0]) for each in found.tensors.values()] == list(range(len(PRESENT)))
    assert len(found.changes) == changes


def test_several_adapters_are_refused() -> None:
    tensors = {f"{PREFIX}{LAYER}.lora_A.{name}.weight": torch.ones(2) for name in ("one", "two")}
    with pytest.raises(AdapterError, match="file holds the adapters one, two"):
        plain_layout(tensors, "file")


def test_an_empty_file_stays_empty() -> None:
    assert plain_layout({}, "file").tensors == {}
