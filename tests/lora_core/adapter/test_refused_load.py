"""A load that is refused changes nothing: wrong tensors, files, configs, models and bases."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import (
    AdapterError,
    BaseMismatchError,
    Identity,
    LoraConfig,
    LoraError,
    fingerprint,
    load_adapter,
    save_adapter,
)
from lora_core.adapter.json_files import CONFIG, IDENTITY, WEIGHTS

Build = Callable[..., LlamaForCausalLM]
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and remove the sidecar, so that its digest does not refuse the folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / IDENTITY).unlink()


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def flipped(folder: Path) -> None:
    """Change one bit of a mantissa: every value stays finite, only the digest detects it."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-4] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def drop_row(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY][:-1].clone()


def transpose(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY].T.contiguous()


TENSOR_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(KEY), f"1 missing, such as {KEY}"),
    "extra": (
        lambda t: t.update({f"{KEY}.more": torch.zeros(1, 1)}),
        f"1 extra, such as {KEY}.more",
    ),
    "renamed": (
        lambda t: t.update({"lora": t.pop(KEY)}),
        "1 missing, such as .*; 1 extra, such as lora",
    ),
    "row dropped": (drop_row, rf"misshapen, such as {KEY} of \(3, 64\), which must be \(4, 64\)"),
    "transposed": (transpose, r"of \(64, 4\), which must be \(4, 64\)"),
    "flat": (lambda t: t.update({KEY: t[KEY].flatten()}), r"of \(256,\), which must be \(4, 64\)"),
    "nan": (lambda t: t[KEY][0].fill_(math.nan), f"{KEY} .*not finite"),
    "infinity": (lambda t: t[KEY][3, 63].fill_(math.inf), f"{KEY} .*not finite"),
    "too large": (lambda t: t.update({KEY: t[KEY].double().fill_(1e300)}), f"{KEY} .*not finite"),
    "integers": (lambda t: t.update({KEY: t[KEY].int()}), f"{KEY} .*int32"),
    "nothing": (lambda t: t.clear(), "8 missing"),
}
FILE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "is damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is damaged"),
    "not safetensors": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"PK\x03\x04" * 100),
        "is damaged",
    ),
    "flipped bit": (flipped, "has sha256"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "pickle only": (pickled, "adapter_model.bin is a pickle"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG} is missing"),
    "half a config": (
        lambda folder: (folder / CONFIG).write_text('{"r": 4,', encoding="utf-8"),
        f"{CONFIG} cannot be read",
    ),
    "a list as config": (
        lambda folder: (folder / CONFIG).write_text("[1]", encoding="utf-8"),
        "contains list",
    ),
    "config in latin-1": (
        lambda folder: (folder / CONFIG).write_bytes(b'{"a": "\xfc"}'),
        f"{CONFIG} cannot be read",
    ),
    "half a sidecar": (
        lambda folder: (folder / IDENTITY).write_text("{", encoding="utf-8"),
        f"{IDENTITY} cannot be read",
    ),
    "a sidecar without digests": (
        lambda folder: (folder / IDENTITY).write_text("{}", encoding="utf-8"),
        "sidecar",
    ),
    "a sidecar with a list of digests": (
        lambda folder: edit_json(folder / IDENTITY, base_digests=[]),
        "",
    ),
    "a sidecar with a number as digest": (
        lambda folder: edit_json(folder / IDENTITY, base_digests={"dense": 7}),
        "",
    ),
}
CONFIG_DAMAGE: list[dict[str, Any]] = [
    {"peft_type": "IA3"},
    {"peft_type": None},
    {"layer_replication": [[0, 1]]},
    {"a_feature_of_tomorrow": 1},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "corda"},
    {"r": 0},
    {"r": "4"},
    {"lora_alpha": None},
    {"lora_alpha": "8"},
    {"lora_alpha": 10**400},
    {"lora_alpha": math.inf},
    {"lora_dropout": 2},
    {"lora_dropout": -(10**400)},
    {"use_rslora": "no"},
    {"target_modules": None},
    {"target_modules": []},
    {"target_modules": 5},
    {"target_modules": [1]},
    {"target_modules": "q_proj("},
]


@pytest.mark.parametrize(("damage", "message"), TENSOR_DAMAGE.values(), ids=TENSOR_DAMAGE.keys())
def test_wrong_tensors_are_refused(
    build_llama: Build,
    adapter_folder: Path,
    refuses: Callable[..., None],
    damage: Callable[..., object],
    message: str,
) -> None:
    edit_tensors(adapter_folder, damage)
    model = build_llama()
    refuses(model, lambda: load_adapter(model, adapter_folder), AdapterError, message)


@pytest.mark.parametrize(("damage", "message"), FILE_DAMAGE.values(), ids=FILE_DAMAGE.keys())
def test_wrong_files_are_refused(
    build_llama: Build,
    adapter_folder: Path,
    refuses: Callable[..., None],
    damage: Callable[..., object],
    message: str,
) -> None:
    damage(adapter_folder)
    model = build_llama()
    refuses(model, lambda: load_adapter(model, adapter_folder), AdapterError, message or IDENTITY)


@pytest.mark.parametrize("change", CONFIG_DAMAGE, ids=str)
def test_wrong_configs_are_refused(
    build_llama: Build, adapter_folder: Path, refuses: Callable[..., None], change: dict[str, Any]
) -> None:
    edit_json(adapter_folder / CONFIG, **change)
    model = build_llama()
    refuses(
        model,
        lambda: load_adapter(model, adapter_folder),
        AdapterError,
        f"{CONFIG} .*{next(iter(change))}",
    )


ANOTHER_ADAPTER: list[dict[str, Any]] = [
    {"target_parameters": ["weight"]},
    {"use_dora": True},
    {"rank_pattern": {"q_proj": 8}},
    {"alpha_pattern": {"q_proj": 8}},
    {"lora_bias": True},
    {"modules_to_save": ["lm_head"]},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 0},
    {"exclude_modules": "down_proj"},
    {"trainable_token_indices": [3]},
]


@pytest.mark.parametrize("with_sidecar", [True, False], ids=["sidecar", "bare"])
@pytest.mark.parametrize("change", ANOTHER_ADAPTER, ids=str)
def test_a_config_of_another_adapter_is_refused(
    build_llama: Build,
    adapter_folder: Path,
    refuses: Callable[..., None],
    change: dict[str, Any],
    with_sidecar: bool,
) -> None:
    """The settings are valid but do not describe the tensors.

    Only another scale is undetectable, and only without a sidecar.
    """
    edit_json(adapter_folder / CONFIG, **change)
    if not with_sidecar:
        (adapter_folder / IDENTITY).unlink()
        if "alpha_pattern" in change:
            return
    model = build_llama()
    refuses(model, lambda: load_adapter(model, adapter_folder), LoraError, None)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_config_without_a_required_key_is_refused(
    build_llama: Build, adapter_folder: Path, refuses: Callable[..., None], key: str
) -> None:
    values = json.loads((adapter_folder / CONFIG).read_text(encoding="utf-8"))
    del values[key]
    (adapter_folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    model = build_llama()
    refuses(model, lambda: load_adapter(model, adapter_folder), AdapterError, key)


@pytest.mark.parametrize("folder", ["absent", "file"])
def test_a_path_without_an_adapter_is_refused(
    build_llama: Build, tmp_path: Path, refuses: Callable[..., None], folder: str
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    model = build_llama()
    path = tmp_path / folder
    refuses(model, lambda: load_adapter(model, path), AdapterError, str(path))


def test_a_model_of_another_shape_is_refused(
    adapter_folder: Path, refuses: Callable[..., None]
) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "down_proj": nn.Linear(128, 64)})
    refuses(
        model,
        lambda: load_adapter(model, adapter_folder),
        AdapterError,
        "4 missing.*8 extra|missing.*extra",
    )


def test_a_model_that_carries_an_adapter_is_refused(
    adapted: LlamaForCausalLM, adapter_folder: Path, refuses: Callable[..., None]
) -> None:
    refuses(
        adapted,
        lambda: load_adapter(adapted, adapter_folder),
        LoraError,
        "already carries an adapter",
    )


def test_another_base_is_refused_unless_accepted(
    build_llama: Build, adapter_folder: Path, refuses: Callable[..., None]
) -> None:
    model = build_llama(seed=1)
    refuses(
        model,
        lambda: load_adapter(model, adapter_folder),
        BaseMismatchError,
        "trained on tiny llama .*dense.*check_base=False",
    )
    assert len(load_adapter(model, adapter_folder, check_base=False)) == 4


def test_another_kind_of_storage_is_refused_unless_its_digest_is_known(
    build_nf4_llama: Build,
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    small_config: LoraConfig,
    refuses: Callable[..., None],
) -> None:
    model = build_nf4_llama()
    refuses(model, lambda: load_adapter(model, adapter_folder), BaseMismatchError, "this nf4 model")
    identity = Identity(base_digests=dict([fingerprint(model)]))
    save_adapter(adapted, adapter_folder, small_config, identity)
    assert len(load_adapter(model, adapter_folder)) == 4
