"""An adapter with edited JSON files is refused with a library error, or it is the same adapter.

Edits are those that a script or a person makes: a value of another type, a key removed or added.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import AdapterError, LoraError, export_gguf, export_vllm, load_adapter
from lora_core.adapter.json_files import CONFIG, IDENTITY, read_identity
from lora_core.spectrum.derived_adapter import write_updates
from lora_core.spectrum.truncation import truncate_adapter
from lora_core.spectrum.updates import read_over_one_base, read_updates

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 0.5, 10**400, float("inf"), float("nan")),
    *(
        "",
        "x",
        "8",
        "q_proj",
        "[",
        "\x00",
        "a" * 5000,
        [],
        [None],
        [1],
        ["x"],
        [[1]],
        [{}],
        {},
        {"a": 1},
        {"q_proj": "x"},
        {"": None},
    ),
    *({"q_proj": [1]}, {"[": 2}, {"dense": 3}, {"dense": None}, {"a": {"b": {}}}),
]
NEW_KEYS = [
    "extra",
    "",
    "layers_pattern",
    "alora_invocation_tokens",
    "r ",
    "lora_config",
    "__class__",
    "base_digest",
    "eva_config",
]
EDITS = 300


def edits(values: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield edited values endlessly, each with a description of the edit."""
    while True:
        key = rng.choice(sorted(values))
        kind = rng.choice(["swap", "swap", "swap", "delete", "add"])
        if kind == "delete":
            yield f"without {key}", {name: value for name, value in values.items() if name != key}
        elif kind == "add":
            new = rng.choice(NEW_KEYS)
            yield f"with {new!r}", {**values, new: rng.choice(ODD)}
        else:
            choices = [odd for odd in ODD if not _is_similar(odd, values[key])]
            odd = rng.choice(choices)
            yield f"{key}={odd!r:.60}", {**values, key: odd}


def _is_similar(odd: Any, value: Any) -> bool:
    """Return whether one value could replace another undetected without a sidecar."""
    if _is_number(value):
        return _is_number(odd) and abs(odd) < 1e9
    return type(odd) is type(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def refused(action: Callable[[], object], what: str) -> bool:
    """Return whether an action raises a library error; other errors fail the test."""
    try:
        action()
    except LoraError as error:
        assert len(str(error)) > 20, what
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


@pytest.mark.parametrize("file", [CONFIG, IDENTITY])
@pytest.mark.parametrize("sidecar", [True, False], ids=["with the sidecar", "without"])
def test_an_edited_adapter_is_refused_or_the_same(
    build_llama: Build,
    adapter_folder: Path,
    logits: Logits,
    tmp_path: Path,
    file: str,
    sidecar: bool,
) -> None:
    """With a sidecar every edit of the config is refused.

    Without one, PEFT's default replaces a missing key; here the default is the original value.
    """
    if file == IDENTITY and not sidecar:
        pytest.skip("this adapter has no sidecar to edit")
    original = build_llama()
    load_adapter(original, adapter_folder)
    expected = logits(original)
    folder = tmp_path / "edited"
    values = json.loads((adapter_folder / file).read_text(encoding="utf-8"))
    rng = random.Random(5)
    shutil.copytree(adapter_folder, folder)
    if not sidecar:
        (folder / IDENTITY).unlink()
    count = 0
    model = build_llama()
    for _, (what, edited) in zip(range(EDITS), edits(values, rng), strict=False):
        (folder / file).write_text(json.dumps(edited), encoding="utf-8")
        if refused(lambda: load_adapter(model, folder), what):  # noqa: B023
            count += 1
            continue
        assert torch.equal(logits(model), expected), what
        model = build_llama()
    if file == CONFIG and sidecar:
        assert count == EDITS
    else:
        assert 0.2 * EDITS < count < 0.9 * EDITS


@pytest.mark.parametrize("file", [CONFIG, IDENTITY])
def test_every_reader_refuses_with_a_library_error(
    adapter_folder: Path, tmp_path: Path, file: str
) -> None:
    """Truncation, combination and the exports read the same files; their output is read again."""
    folder = tmp_path / "edited"
    out = tmp_path / "out"
    values = json.loads((adapter_folder / file).read_text(encoding="utf-8"))
    rng = random.Random(6)
    shutil.copytree(adapter_folder, folder)
    if file == CONFIG:
        (folder / IDENTITY).unlink()
    actions: list[Callable[[], object]] = [
        lambda: read_over_one_base([folder, adapter_folder]),
        lambda: (
            write_updates(out, read_updates(adapter_folder), like=folder, derived_by="nothing")
            and read_updates(out)
        ),
        lambda: truncate_adapter(folder, out, 2) and read_updates(out),
        lambda: export_vllm(folder, out, max_rank=8) and read_updates(out),
        lambda: export_gguf(folder, tmp_path / "out.gguf", base_config=tmp_path),
    ]
    counts = [0] * len(actions)
    for _, (what, edited) in zip(range(EDITS // 3), edits(values, rng), strict=False):
        (folder / file).write_text(json.dumps(edited), encoding="utf-8")
        for number, action in enumerate(actions):
            counts[number] += refused(action, what)
    assert all(0 < count < EDITS // 3 for count in counts[:-1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"base_digests": ["dense"]},
            r"has base_digests=\['dense'\], but it must be an object; fetch",
        ),
        ({"base_digests": None}, "has base_digests=None, but it must be an object"),
        ({"base_digests": {"dense": 7}}, "has the dense digest 7, but it must be a string"),
        ({"lineage": "trained"}, "has lineage='trained', but it must be an object"),
        ({"tensor_sha256": 3}, "has tensor_sha256=3, but it must be an object"),
        ({"adapter_sha256": {}}, "has adapter_sha256={}, but it must be a string"),
        ({"base": 5}, "has base=5, but it must be a string"),
    ],
    ids=str,
)
def test_an_error_names_the_wrong_value_of_a_sidecar(
    build_llama: Build, adapter_folder: Path, values: dict[str, Any], message: str
) -> None:
    identity = read_identity(adapter_folder) or {}
    (adapter_folder / IDENTITY).write_text(json.dumps({**identity, **values}), encoding="utf-8")
    for action in (
        lambda: load_adapter(build_llama(), adapter_folder),
        lambda: read_updates(adapter_folder),
        lambda: read_over_one_base([adapter_folder, adapter_folder]),
    ):
        with pytest.raises(AdapterError, match=message):
            action()


def test_a_sidecar_without_a_base_name_loads(build_llama: Build, adapter_folder: Path) -> None:
    identity = read_identity(adapter_folder) or {}
    unnamed = {**identity, "base": None, "revision": None}
    (adapter_folder / IDENTITY).write_text(json.dumps(unnamed), encoding="utf-8")
    load_adapter(build_llama(), adapter_folder)
