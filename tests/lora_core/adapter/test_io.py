"""A saved adapter comes back bit for bit, equal adapters have equal bytes, and a load that is refused changes nothing.

test_parity_peft.py holds the same format against PEFT.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
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
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lora_core.adapter.adapter_files import read_identity
from lora_core.adapter.peft_config import read_config

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
WEIGHTS, CONFIG, SIDECAR = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "adapter_identity.json",
)
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
# PEFT 0.21 asks transformers 5.23 under a name that transformers renames in 6; nothing about the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ADAPTER_CONFIGS = [
    LoraConfig(r=4, lora_alpha=8),
    LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "up_proj"), lora_dropout=0.25),
    LoraConfig(r=3, lora_alpha=5, target_modules=r".*layers\.1\..*_proj", use_rslora=True),
    LoraConfig(r=4, lora_alpha=0.5, init_lora_weights="gaussian"),
]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8"
    )


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and drop the sidecar, so that not its digest is what refuses the folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SIDECAR).unlink()


# --- save and load ---


@pytest.mark.parametrize(
    "config", ADAPTER_CONFIGS, ids=["all", "names", "regex-rslora", "gaussian"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_adapter_gives_the_same_logits_bit_for_bit(
    build_llama: Build,
    randomise: Callable[[nn.Module], None],
    logits: Logits,
    tmp_path: Path,
    config: LoraConfig,
    dtype: torch.dtype,
) -> None:
    model, fresh = build_llama(dtype=dtype), build_llama(dtype=dtype)
    targets = inject(model, config, seed=0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    assert load_adapter(fresh, tmp_path / "adapter") == targets
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.equal(logits(fresh), logits(build_llama(dtype=dtype)))


def test_an_nf4_adapter_comes_back(
    build_nf4_llama: Build, randomise: Callable[[nn.Module], None], logits: Logits, tmp_path: Path
) -> None:
    model, fresh = build_nf4_llama(), build_nf4_llama()
    inject(model, ADAPTER_CONFIGS[0], seed=0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", ADAPTER_CONFIGS[0], Identity())
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    "config", ADAPTER_CONFIGS, ids=["all", "names", "regex-rslora", "gaussian"]
)
def test_a_config_comes_back(build_llama: Build, tmp_path: Path, config: LoraConfig) -> None:
    model = build_llama()
    inject(model, config, seed=0)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    found = read_config(tmp_path / "adapter")
    assert found.scale == config.scale
    assert (found.lora_dropout, found.use_rslora, found.init_lora_weights) == (
        config.lora_dropout,
        config.use_rslora,
        config.init_lora_weights,
    )


ORDERED = {
    "ranks": LoraConfig(r=6, lora_alpha=12, rank_pattern={r"layers\.0\..*": 3, "down_proj": 5}),
    "alphas": LoraConfig(
        r=4,
        lora_alpha=12,
        alpha_pattern={r"layers\.0\..*": 1, "down_proj": 64, "mlp.up_proj": 2, "k_proj": 3},
    ),
    "both": LoraConfig(
        r=4,
        lora_alpha=12,
        rank_pattern={"up_proj": 2, ".*_proj": 3},
        alpha_pattern={"up_proj": 9, ".*_proj": 2},
    ),
    "a start that doubles": LoraConfig(
        r=4,
        lora_alpha=12,
        init_lora_weights="olora",
        alpha_pattern={r"layers\.0\..*": 1, "down_proj": 64},
        use_rslora=True,
    ),
}


@pytest.mark.parametrize("config", ORDERED.values(), ids=ORDERED.keys())
def test_the_order_of_patterns_survives_a_file_of_sorted_keys(
    build_llama: Build,
    randomise: Callable[[nn.Module], None],
    logits: Logits,
    tmp_path: Path,
    config: LoraConfig,
) -> None:
    """The first pattern that matches decides, here one that comes last by the alphabet; in PEFT as well."""
    model, fresh = build_llama(), build_llama()
    inject(model, config, seed=0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    load_adapter(fresh, tmp_path / "adapter")
    scales = {name: layer.scale for name, layer in lora_layers(model)}
    assert {name: layer.scale for name, layer in lora_layers(fresh)} == pytest.approx(scales)
    assert len(set(scales.values())) > 1
    torch.testing.assert_close(
        logits(fresh), logits(model), rtol=1e-5, atol=1e-5
    )  # a doubled start is added up in another order
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path / "adapter").base_model.model
    for name, scale in scales.items():
        assert theirs.get_submodule(name).scaling["default"] == pytest.approx(scale)


def test_equal_adapters_give_equal_bytes(
    build_llama: Build, randomise: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """Two runs that list their targets and their lineage in another order."""
    one, two = ("q_proj", "up_proj", "k_proj"), ("up_proj", "k_proj", "q_proj")
    for name, targets, lineage in (
        ("one", one, {"data": "d", "recipe": "r"}),
        ("two", two, {"recipe": "r", "data": "d"}),
    ):
        model, config = build_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        inject(model, config, seed=0)
        randomise(model)
        save_adapter(model, tmp_path / name, config, Identity(base="b", lineage=lineage))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert set(digests(tmp_path / "one")) == {WEIGHTS, CONFIG, SIDECAR}


def test_a_second_save_of_a_loaded_adapter_has_the_same_bytes(
    build_llama: Build, adapter_folder: Path, small_config: LoraConfig
) -> None:
    model, again = build_llama(), adapter_folder.with_name("again")
    load_adapter(model, adapter_folder)
    save_adapter(model, again, small_config, Identity(base="tiny llama"))
    assert digests(again) == digests(adapter_folder)


def test_the_file_is_in_the_published_format(
    adapted: LlamaForCausalLM, adapter_folder: Path
) -> None:
    with safe_open(adapter_folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {
            key: (tuple(file.get_tensor(key).shape), file.get_tensor(key).dtype)
            for key in file.keys()  # noqa: SIM118
        }
    expected = {}
    for i in (0, 1):
        for part, wide, out in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 128, 64)):
            path = f"base_model.model.model.layers.{i}.{part}"
            expected[f"{path}.lora_A.weight"] = ((4, wide), torch.float32)
            expected[f"{path}.lora_B.weight"] = ((out, 4), torch.float32)
    assert found == expected
    layer = adapted.model.layers[1].mlp.down_proj
    tensors = load_file(adapter_folder / WEIGHTS)
    assert torch.equal(
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"], layer.lora_B
    )


def test_the_config_file_is_in_the_published_format(adapter_folder: Path) -> None:
    values = json.loads((adapter_folder / CONFIG).read_text(encoding="utf-8"))
    assert list(values) == sorted(values)
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny llama",
        "bias": "none",
        "r": 4,
    }
    expected |= {
        "lora_alpha": 8,
        "target_modules": ["down_proj", "q_proj"],
        "use_dora": False,
        "rank_pattern": {},
        "inference_mode": True,
    }
    assert {key: values[key] for key in expected} == expected


def test_the_sidecar_names_base_digests_and_lineage(
    adapted: LlamaForCausalLM, small_config: LoraConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    identity = Identity(
        base="hub/name", revision="abc", base_digests={"nf4": "n"}, lineage={"data": "d"}
    )
    sha256 = save_adapter(adapted, folder, small_config, identity)
    found = read_identity(folder)
    assert found is not None
    assert sha256 == digests(folder)[WEIGHTS] == found["adapter_sha256"]
    assert found["base_digests"] == {"nf4": "n", "dense": fingerprint(adapted)[1]}
    assert (found["base"], found["revision"], found["lineage"]) == (
        "hub/name",
        "abc",
        {"data": "d"},
    )
    tensors = load_file(folder / WEIGHTS)
    assert found["tensor_sha256"] == {
        key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()
    }


def test_wrappers_leave_no_trace_in_the_files(
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    small_config: LoraConfig,
    wrapper: Callable[[nn.Module], nn.Module],
) -> None:
    wrapped = adapter_folder.with_name("wrapped")
    save_adapter(wrapper(adapted), wrapped, small_config, Identity(base="tiny llama"))
    assert digests(wrapped) == digests(adapter_folder)


def test_an_adapter_without_a_sidecar_loads(
    build_llama: Build, adapted: LlamaForCausalLM, adapter_folder: Path, logits: Logits
) -> None:
    (adapter_folder / SIDECAR).unlink()
    model = build_llama()
    load_adapter(model, adapter_folder)
    assert torch.equal(logits(model), logits(adapted))


# --- a failing save ---


def with_nan(model: nn.Module) -> None:
    model.get_parameter("model.layers.1.mlp.down_proj.lora_B").data[3, 1] = math.nan


def with_infinity(model: nn.Module) -> None:
    model.get_parameter("model.layers.0.self_attn.q_proj.lora_A").data[0, 0] = -math.inf


def gathered_away(model: nn.Module) -> None:
    """What a parameter looks like on a process that holds only its share of a sharded model."""
    model.get_parameter("model.layers.0.self_attn.q_proj.lora_A").data = torch.empty(0)


def half_gathered(model: nn.Module) -> None:
    model.get_parameter("model.layers.0.self_attn.q_proj.lora_A").data = torch.zeros(2, 64)


@pytest.mark.parametrize(
    "spoil",
    [with_nan, with_infinity, gathered_away, half_gathered],
    ids=lambda function: function.__name__,
)
def test_a_spoilt_adapter_is_not_written(
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    small_config: LoraConfig,
    spoil: Callable[[nn.Module], None],
) -> None:
    before = digests(adapter_folder)
    spoil(adapted)
    with pytest.raises(AdapterError, match=r"layers\.\d\..*lora_[AB]"):
        save_adapter(adapted, adapter_folder, small_config, Identity())
    assert digests(adapter_folder) == before


def test_a_model_without_an_adapter_is_not_written(
    build_llama: Build, small_config: LoraConfig, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="adapter"):
        save_adapter(build_llama(), tmp_path / "adapter", small_config, Identity())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "down_proj")),
        LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj", "down_proj")),
        LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"), use_rslora=True),
        LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",)),
    ],
    ids=["rank", "alpha", "rslora", "targets"],
)
def test_a_config_other_than_the_injected_one_is_not_written(
    adapted: LlamaForCausalLM, tmp_path: Path, other: LoraConfig
) -> None:
    """Such a folder could not be loaded, or would be loaded at another scale."""
    with pytest.raises(AdapterError, match="config"):
        save_adapter(adapted, tmp_path / "adapter", other, Identity())
    assert list(tmp_path.iterdir()) == []


def refuse_weights(*_: object, **__: object) -> None:
    raise OSError("no space left")


@pytest.mark.parametrize("stage", ["weights", "sidecar"])
def test_a_failing_write_keeps_the_former_folder(
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    small_config: LoraConfig,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    before, siblings = digests(adapter_folder), sorted(adapter_folder.parent.iterdir())
    lineage: dict[str, Any] = {}
    if stage == "weights":
        monkeypatch.setattr("lora_core.adapter.io.save_file", refuse_weights)
    else:
        lineage["data"] = (
            object()
        )  # no JSON: found out when the other two files are already written
    with pytest.raises((OSError, TypeError)):
        save_adapter(adapted, adapter_folder, small_config, Identity(lineage=lineage))
    assert digests(adapter_folder) == before
    assert sorted(adapter_folder.parent.iterdir()) == siblings


# --- a refused load ---


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def flipped(folder: Path) -> None:
    """Change one bit of a mantissa: every value stays finite, only the digest can tell."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-4] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut_row(tensors: dict[str, Tensor]) -> None:
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
    "cut": (cut_row, rf"misshapen, such as {KEY} of \(3, 64\) where \(4, 64\)"),
    "transposed": (transpose, r"of \(64, 4\) where \(4, 64\)"),
    "flat": (lambda t: t.update({KEY: t[KEY].flatten()}), r"of \(256,\) where \(4, 64\)"),
    "nan": (lambda t: t[KEY][0].fill_(math.nan), f"{KEY} .*not finite"),
    "infinity": (lambda t: t[KEY][3, 63].fill_(math.inf), f"{KEY} .*not finite"),
    "too large": (lambda t: t.update({KEY: t[KEY].double().fill_(1e300)}), f"{KEY} .*not finite"),
    "integers": (lambda t: t.update({KEY: t[KEY].int()}), f"{KEY} .*int32"),
    "nothing": (lambda t: t.clear(), "8 missing"),
}
FILE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "is damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is damaged"),
    "no safetensors": (
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
        "holds list",
    ),
    "config in latin-1": (
        lambda folder: (folder / CONFIG).write_bytes(b'{"a": "\xfc"}'),
        f"{CONFIG} cannot be read",
    ),
    "half a sidecar": (
        lambda folder: (folder / SIDECAR).write_text("{", encoding="utf-8"),
        f"{SIDECAR} cannot be read",
    ),
    "a sidecar without digests": (
        lambda folder: (folder / SIDECAR).write_text("{}", encoding="utf-8"),
        "sidecar",
    ),
    "a sidecar with a list of digests": (
        lambda folder: edit_json(folder / SIDECAR, base_digests=[]),
        "",
    ),
    "a sidecar with a number as digest": (
        lambda folder: edit_json(folder / SIDECAR, base_digests={"dense": 7}),
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
    refuses(model, lambda: load_adapter(model, adapter_folder), AdapterError, message or SIDECAR)


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
    {"bias": "all"},
    {"lora_bias": True},
    {"modules_to_save": ["lm_head"]},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 0},
    {"exclude_modules": "down_proj"},
    {"trainable_token_indices": [3]},
]


@pytest.mark.parametrize("with_sidecar", [True, False], ids=["sidecar", "bare"])
@pytest.mark.parametrize("change", ANOTHER_ADAPTER, ids=str)
def test_a_config_that_says_another_adapter_is_refused(
    build_llama: Build,
    adapter_folder: Path,
    refuses: Callable[..., None],
    change: dict[str, Any],
    with_sidecar: bool,
) -> None:
    """Settings that are understood and are not those of the file; only another scale could pass, and not beside a sidecar."""
    edit_json(adapter_folder / CONFIG, **change)
    if not with_sidecar:
        (adapter_folder / "adapter_identity.json").unlink()
        if "alpha_pattern" in change:
            return
    model = build_llama()
    refuses(model, lambda: load_adapter(model, adapter_folder), LoraError, None)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_config_without_what_a_scale_needs_is_refused(
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
    refuses(
        model, lambda: load_adapter(model, tmp_path / folder), AdapterError, str(tmp_path / folder)
    )


def test_a_model_of_other_shape_is_refused(
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
    save_adapter(
        adapted, adapter_folder, small_config, Identity(base_digests=dict([fingerprint(model)]))
    )
    assert len(load_adapter(model, adapter_folder)) == 4


def test_a_wrapped_model_loads(
    build_llama: Build,
    adapted: LlamaForCausalLM,
    adapter_folder: Path,
    logits: Logits,
    wrapper: Callable[[nn.Module], nn.Module],
) -> None:
    model = build_llama()
    load_adapter(wrapper(model), adapter_folder)
    assert torch.equal(logits(model), logits(adapted))
