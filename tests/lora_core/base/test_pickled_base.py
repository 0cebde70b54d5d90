"""A base stored as pickles is converted without running code, and keeps its fingerprint."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lora_core import CheckpointError, convert_pickled_base, fingerprint, fingerprint_of_folder

Build = Callable[..., LlamaForCausalLM]
INDEX = "pytorch_model.bin.index.json"


def pickled(model: LlamaForCausalLM, folder: Path, *, shards: int = 1) -> Path:
    """Save a model as older versions of transformers did."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state: dict[str, Any] = dict(model.state_dict(keep_vars=False))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tf_model.h5").write_bytes(b"x")
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in list(state)[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_converted_base_is_the_same_model(
    build_llama: Build,
    assert_same_state: Callable[[dict[str, Tensor], dict[str, Tensor]], None],
    tmp_path: Path,
    shards: int,
    tied: bool,
) -> None:
    model = build_llama(tied=tied)
    base = pickled(model, tmp_path / "base", shards=shards)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    names = convert_pickled_base(base, tmp_path / "converted")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    expected = {*names, "config.json", "tokenizer.json"}
    if shards > 1:
        expected.add("model.safetensors.index.json")
    assert {path.name for path in (tmp_path / "converted").iterdir()} == expected
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert fingerprint_of_folder(tmp_path / "converted") == fingerprint(model)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def with_code(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Code()}, protocol=2))


def with_objects(folder: Path) -> None:
    torch.save({"weight": [1, 2]}, folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])


def without_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()


def leaving_the_folder(folder: Path) -> None:
    without_weights(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../pytorch_model.bin"}}))


def with_missing_shard(folder: Path) -> None:
    without_weights(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (with_code, "holds more than tensors"),
    "objects": (with_objects, "must map names to tensors"),
    "truncated": (truncated, "is damaged, or holds more than tensors"),
    "no weights": (without_weights, "has neither pytorch_model.bin nor"),
    "path": (leaving_the_folder, "must be a .bin file in the same folder"),
    "missing shard": (with_missing_shard, "pytorch_model-1.bin is missing; fetch the base again"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_other_content_is_refused(
    build_llama: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    base = pickled(build_llama(), tmp_path / "base")
    damage(base)
    with pytest.raises(CheckpointError, match=message):
        convert_pickled_base(base, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    assert capsys.readouterr().out == ""


def test_tensor_that_the_index_does_not_name_is_refused(build_llama: Build, tmp_path: Path) -> None:
    base = pickled(build_llama(), tmp_path / "base", shards=2)
    index = json.loads((base / INDEX).read_text())
    removed = next(iter(index["weight_map"]))
    del index["weight_map"][removed]
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"does not name {removed}"):
        convert_pickled_base(base, tmp_path / "converted")


def test_destination_inside_the_base_is_refused(build_llama: Build, tmp_path: Path) -> None:
    base = pickled(build_llama(), tmp_path / "base")
    with pytest.raises(CheckpointError, match="overlaps"):
        convert_pickled_base(base, base / "converted")


def test_refusal_of_a_pickle_names_the_converter(build_llama: Build, tmp_path: Path) -> None:
    base = pickled(build_llama(), tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"lora_core\.convert_pickled_base"):
        fingerprint_of_folder(base)
