"""A verified adapter has the recorded bytes, finite values and the right base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_adapters import WEIGHTS, Edit, Tensors, Values, edit_adapter
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    BaseMismatchError,
    LoraError,
    MergeError,
    verify_adapter,
)


@pytest.fixture
def other_base(build_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    build_llama(seed=1).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_our_adapter_is_verified_on_its_base(adapter_folder: Path, llama_folder: Path) -> None:
    found = verify_adapter(adapter_folder, llama_folder)
    assert found.files == "both files and 8 tensors have the digests of the sidecar"
    assert found.values == "8 tensors of 4 updates are complete and finite"
    assert found.base == f"{llama_folder} has the recorded fingerprint"


def test_pefts_adapter_is_verified_by_its_shapes(plain: Path, llama_folder: Path) -> None:
    found = verify_adapter(plain, llama_folder)
    assert found.files == "not recorded: the adapter has no sidecar"
    assert "6 adapted weights of the right shapes" in found.base
    assert verify_adapter(plain).base == "not checked: no base was given or found"


def test_another_base_is_refused(adapter_folder: Path, other_base: Path) -> None:
    with pytest.raises(BaseMismatchError, match="was trained on tiny llama"):
        verify_adapter(adapter_folder, other_base)


def test_a_base_of_other_shapes_is_refused(
    edited: Callable[[Edit], Path], llama_folder: Path
) -> None:
    def widen(tensors: Tensors, values: Values) -> None:
        for key in tensors:
            if key.endswith("q_proj.lora_A.weight"):
                tensors[key] = torch.randn(4, 80)

    with pytest.raises(MergeError, match=r"is \(64, 80\) and its weight \(64, 64\)"):
        verify_adapter(edited(widen), llama_folder)


def change_a_value(tensors: Tensors, values: Values) -> None:
    next(iter(tensors.values()))[0, 0] += 1


def change_a_setting(tensors: Tensors, values: Values) -> None:
    values["lora_alpha"] = 9


@pytest.mark.parametrize("change", [change_a_value, change_a_setting])
def test_a_changed_file_is_refused(adapter_folder: Path, tmp_path: Path, change: Edit) -> None:
    folder = edit_adapter(adapter_folder, tmp_path / "changed", change)
    with pytest.raises(AdapterError, match="but its sidecar records"):
        verify_adapter(folder)


def test_a_wrong_digest_of_one_tensor_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(adapter_folder, folder)
    sidecar = folder / "adapter_identity.json"
    values = json.loads(sidecar.read_text())
    key = min(values["tensor_sha256"])
    values["tensor_sha256"][key] = "0" * 64
    sidecar.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=f"{key} of .* is not the tensor that its sidecar"):
        verify_adapter(folder)


def make_infinite(tensors: Tensors, values: Values) -> None:
    next(iter(tensors.values()))[0, 0] = torch.inf


def drop_a_factor(tensors: Tensors, values: Values) -> None:
    del tensors[max(tensors)]


@pytest.mark.parametrize(
    ("change", "message"),
    [(make_infinite, "not finite"), (drop_a_factor, "updates lack B")],
    ids=["infinite", "incomplete"],
)
def test_damage_is_refused(edited: Callable[[Edit], Path], change: Edit, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        verify_adapter(edited(change))


def test_a_truncated_file_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(plain, folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(LoraError, match="is damaged"):
        verify_adapter(folder)
