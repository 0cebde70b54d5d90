"""What a training reports about its adapter's updates."""

from pathlib import Path

import pytest
import torch
from peft_adapters import edit_adapter, save_peft_adapter

from lora_core import count_intruders
from pipelines.training.spectra import spectrum


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strong adapter of rank 4; only read."""
    folder = tmp_path_factory.mktemp("adapters") / "strong"
    return save_peft_adapter(tiny_folder, folder, lora_alpha=400)


def test_every_module_has_its_spectrum_and_intruders(adapter: Path, tiny_folder: Path) -> None:
    counts = count_intruders(adapter, tiny_folder)
    modules = spectrum(adapter, tiny_folder)
    assert {each.module: each.intruders for each in modules} == {
        name: count.left for name, count in counts.items()
    }
    assert any(each.intruders for each in modules)
    assert all(len(each.values) == each.rank == 4 for each in modules)


def test_a_base_without_the_weights_as_such_leaves_intruders_out(
    adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    modules = spectrum(adapter, tmp_path)
    assert len(modules) == 6
    assert {each.intruders for each in modules} == {None}


def test_more_than_low_rank_updates_has_no_spectrum(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    def add_bias(tensors: dict[str, torch.Tensor], values: dict[str, object]) -> None:
        tensors["base_model.model.model.layers.0.mlp.down_proj.base_layer.bias"] = torch.ones(64)

    more = edit_adapter(adapter, tmp_path / "more", add_bias)
    assert spectrum(more, tiny_folder) == ()
