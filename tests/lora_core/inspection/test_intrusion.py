"""Intruder dimensions of adapters in folders, and the sample of layers that is measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from peft_adapters import WEIGHTS, Edit, Tensors, Values, save_peft_adapter, settings_of
from safetensors.torch import load_file

from lora_core import AdapterError, count_intruders
from lora_core.inspection.intrusion import Sample, spread_evenly
from lora_core.spectrum.intruders import intruder_work


def reference(adapter: Path, base: Path, leading: int) -> dict[str, int]:
    """Count by the definition, with NumPy, from the tensors in the files."""
    weights = load_file(base / "model.safetensors")
    tensors = load_file(adapter / WEIGHTS)
    scale = settings_of(adapter)["lora_alpha"] / 4
    counts = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight")
        name = path.removeprefix("base_model.model.")
        weight = weights[f"{name}.weight"].double().numpy()
        merged = weight + scale * (tensors[f"{path}.lora_B.weight"] @ tensors[key]).numpy()
        magnitude = tensors.get(f"{path}.lora_magnitude_vector")
        if magnitude is not None:
            norms = np.linalg.norm(merged, axis=1, keepdims=True)
            merged = magnitude.numpy()[:, None] * merged / norms
        left = np.linalg.svd(weight, full_matrices=False)[0]
        vectors = np.linalg.svd(merged)[0][:, :leading]
        counts[name] = int((np.abs(vectors.T @ left).max(axis=1) < 0.5).sum())
    return counts


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_counts_equal_numpys_on_the_stored_weights(
    llama_folder: Path, tmp_path: Path, use_dora: bool
) -> None:
    adapter = tmp_path / "adapter"
    save_peft_adapter(llama_folder, adapter, lora_alpha=8, use_dora=use_dora)
    found = count_intruders(adapter, llama_folder, leading=4)
    expected = reference(adapter, llama_folder, 4)
    assert {name: each.left for name, each in found.items()} == expected
    assert 0 < sum(expected.values()) < 24


def test_an_adapter_over_a_changed_base_is_refused(
    edited: Callable[[Edit], Path], llama_folder: Path
) -> None:
    """PiSSA trains over W minus its strongest directions, which the base does not have."""

    def initialize(tensors: Tensors, values: Values) -> None:
        values["init_lora_weights"] = "pissa"

    with pytest.raises(AdapterError, match="'pissa', which changes the base"):
        count_intruders(edited(initialize), llama_folder)


def test_a_sample_has_the_same_layers_of_each_kind(plain: Path, llama_folder: Path) -> None:
    found = count_intruders(plain, llama_folder, sample=Sample(layers=1))
    assert len(found) == 3
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "v_proj", "down_proj"}


def test_work_limits_the_sample(plain: Path, llama_folder: Path) -> None:
    one_layer = intruder_work(64, 64) + intruder_work(32, 64) + intruder_work(64, 128)
    for work, number in ((2 * one_layer, 6), (1.5 * one_layer, 3), (0.9 * one_layer, 0)):
        sample = Sample(layers=0, work=work)
        assert len(count_intruders(plain, llama_folder, sample=sample)) == number


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, "f"), (2, "ak"), (3, "afk"), (11, "abcdefghijk"), (99, "abcdefghijk")],
)
def test_layers_are_spread_from_first_to_last(count: int, expected: str) -> None:
    assert "".join(spread_evenly("abcdefghijk", count)) == expected
