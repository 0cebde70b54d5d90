"""An adapter whose JSON files were edited is refused in the library's own words, or it is the same adapter.

Edits are of the kinds that a script or a hand makes: a value of another type, a key that is gone, a key that is new.
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
from lora_core.adapter.adapter_files import read_identity
from lora_core.spectrum.truncation import truncate_adapter
from lora_core.spectrum.updates import read_over_one_base, read_updates, write_updates

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
CONFIG, SIDECAR = "adapter_config.json", "adapter_identity.json"
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
    """Yield edited values for ever, each with a word on what was done."""
    while True:
        key = rng.choice(sorted(values))
        kind = rng.choice(["swap", "swap", "swap", "delete", "add"])
        if kind == "delete":
            yield f"without {key}", {name: value for name, value in values.items() if name != key}
        elif kind == "add":
            yield f"with {(new := rng.choice(NEW_KEYS))!r}", {**values, new: rng.choice(ODD)}
        else:
            odd = rng.choice([odd for odd in ODD if not _is_a_like_value(odd, values[key])])
            yield f"{key}={odd!r:.60}", {**values, key: odd}


def _is_a_like_value(odd: Any, value: Any) -> bool:
    """Tell whether one value could stand for another: a file without a sidecar does not say which was meant."""
    if _is_number(value):
        return _is_number(odd) and abs(odd) < 1e9
    return type(odd) is type(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def refused(action: Callable[[], object], what: str) -> bool:
    """Tell whether an action refuses; any other error than the library's is a failure, and so is one without a remedy."""
    try:
        action()
    except LoraError as error:
        assert len(str(error)) > 20, what
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


@pytest.mark.parametrize("file", [CONFIG, SIDECAR])
@pytest.mark.parametrize("sidecar", [True, False], ids=["with the sidecar", "without"])
def test_an_edited_adapter_is_refused_or_the_same(
    build_llama: Build,
    adapter_folder: Path,
    logits: Logits,
    tmp_path: Path,
    file: str,
    sidecar: bool,
) -> None:
    """A config beside its sidecar is refused whatever was edited; alone, what is gone counts as PEFT's default, here what it was."""
    if file == SIDECAR and not sidecar:
        pytest.skip("there is no such file to edit")
    load_adapter(whole := build_llama(), adapter_folder)
    expected, folder = logits(whole), tmp_path / "edited"
    values, rng = json.loads((adapter_folder / file).read_text(encoding="utf-8")), random.Random(5)
    shutil.copytree(adapter_folder, folder)
    if not sidecar:
        (folder / SIDECAR).unlink()
    count, model = 0, build_llama()
    for _, (what, edited) in zip(range(EDITS), edits(values, rng), strict=False):
        (folder / file).write_text(json.dumps(edited), encoding="utf-8")
        if refused(lambda: load_adapter(model, folder), what):  # noqa: B023
            count += 1
            continue
        assert torch.equal(logits(model), expected), what
        model = build_llama()
    assert count == EDITS if file == CONFIG and sidecar else 0.2 * EDITS < count < 0.9 * EDITS


@pytest.mark.parametrize("file", [CONFIG, SIDECAR])
def test_every_reader_refuses_in_the_librarys_words(
    adapter_folder: Path, tmp_path: Path, file: str
) -> None:
    """A cut, a sum and the exports read the same files; what they write is read again."""
    folder, out = tmp_path / "edited", tmp_path / "out"
    values, rng = json.loads((adapter_folder / file).read_text(encoding="utf-8")), random.Random(6)
    shutil.copytree(adapter_folder, folder)
    if file == CONFIG:
        (folder / SIDECAR).unlink()
    actions: list[Callable[[], object]] = [
        lambda: read_over_one_base([folder, adapter_folder]),
        lambda: (
            write_updates(out, read_updates(adapter_folder), like=folder, done="nothing")
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
            r"has base_digests=\['dense'\], where an object belongs; fetch",
        ),
        ({"base_digests": None}, "has base_digests=None, where an object belongs"),
        ({"base_digests": {"dense": 7}}, "has the dense digest 7, where text belongs"),
        ({"lineage": "trained"}, "has lineage='trained', where an object belongs"),
        ({"tensor_sha256": 3}, "has tensor_sha256=3, where an object belongs"),
        ({"adapter_sha256": {}}, "has adapter_sha256={}, where text belongs"),
        ({"base": 5}, "has base=5, where text belongs"),
    ],
    ids=str,
)
def test_a_sidecar_says_which_value_does_not_belong(
    build_llama: Build, adapter_folder: Path, values: dict[str, Any], message: str
) -> None:
    identity = read_identity(adapter_folder)
    (adapter_folder / SIDECAR).write_text(
        json.dumps({**(identity or {}), **values}), encoding="utf-8"
    )
    for action in (
        lambda: load_adapter(build_llama(), adapter_folder),
        lambda: read_updates(adapter_folder),
        lambda: read_over_one_base([adapter_folder, adapter_folder]),
        lambda: (
            write_updates(adapter_folder.with_name("out"), {}, like=adapter_folder, done="nothing")
            if values
            else None
        ),
    )[:3]:
        with pytest.raises(AdapterError, match=message):
            action()


def test_a_name_that_was_never_given_is_no_error(build_llama: Build, adapter_folder: Path) -> None:
    identity = read_identity(adapter_folder)
    (adapter_folder / SIDECAR).write_text(
        json.dumps({**(identity or {}), "base": None, "revision": None}), encoding="utf-8"
    )
    load_adapter(build_llama(), adapter_folder)
