"""A damaged adapter is never loaded silently: it is refused, or what was damaged is no part of what is computed."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from lora_core import LoraError, load_adapter
from lora_core.adapter.io import adapter_tensors

Build = Callable[..., LlamaForCausalLM]
FILES = ("adapter_model.safetensors", "adapter_config.json", "adapter_identity.json")
FLIPS, CUTS = 1000, 100


def flip(path: Path, rng: random.Random) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    """Drop the end."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


@pytest.mark.parametrize(("damage", "times"), [(flip, FLIPS), (cut, CUTS)], ids=["bit flips", "truncations"])
def test_a_damaged_adapter_is_refused_or_computes_the_same(
    build_llama: Build, adapter_folder: Path, tmp_path: Path, damage: Callable[[Path, random.Random], None], times: int
) -> None:
    rng, folder = random.Random(7), tmp_path / "damaged"
    whole = build_llama()
    load_adapter(whole, adapter_folder)
    expected, refused, model = adapter_tensors(whole), 0, build_llama()
    for round_ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter_folder, folder)
        damage(folder / FILES[round_ % len(FILES)], rng)
        try:
            load_adapter(model, folder)
        except LoraError:
            refused += 1  # and the model is as it was
            continue
        found, model = adapter_tensors(model), build_llama()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert refused > 0.9 * times * 2 / 3  # the sidecar's lineage and tensor digests decide nothing that is computed
