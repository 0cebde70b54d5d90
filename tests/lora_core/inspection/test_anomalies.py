"""Each kind of damage and each trap is reported with the module or setting that has it."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft_adapters import Edit, Tensors, Values
from torch import Tensor

from lora_core import inspect_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN = "base_model.model.model.layers.1.mlp.down_proj"
Change = Callable[[Tensor], Tensor]


def changed(key: str, change: Change, tensors: Tensors, values: Values) -> None:
    tensors[key] = change(tensors[key])


def removed(key: str, tensors: Tensors, values: Values) -> None:
    del tensors[key]


def added(key: str, tensors: Tensors, values: Values) -> None:
    tensors[key] = torch.ones(3)


def setting(name: str, value: object, tensors: Tensors, values: Values) -> None:
    values[name] = value


def all_zero(tensors: Tensors, values: Values) -> None:
    for key in tensors:
        tensors[key] = torch.zeros_like(tensors[key]) if "lora_B" in key else tensors[key]


def too_wide(tensors: Tensors, values: Values) -> None:
    """Give v, whose weight is 32 × 64, the rank 40 with the same scale."""
    for layer in (0, 1):
        path = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        tensors[f"{path}.lora_A.weight"] = 0.1 * torch.randn(40, 64)
        tensors[f"{path}.lora_B.weight"] = 0.1 * torch.randn(32, 40)
    values |= {"rank_pattern": {"v_proj": 40}, "alpha_pattern": {"v_proj": 80}}


def nothing(x: Tensor) -> Tensor:
    return x[:0]


def bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


DAMAGE: dict[str, tuple[Edit, str, str]] = {
    "A missing": (partial(removed, f"{Q}.lora_A.weight"), "pair", "1 updates lack A: model.layers"),
    "B missing": (partial(removed, f"{Q}.lora_B.weight"), "pair", "1 updates lack B: model.layers"),
    "misfit": (partial(changed, f"{Q}.lora_A.weight", lambda x: x[:2]), "pair", "do not fit"),
    "empty": (partial(changed, f"{DOWN}.lora_B.weight", nothing), "empty", "1 tensors are empty"),
    "NaN": (partial(changed, f"{Q}.lora_B.weight", lambda x: x * torch.nan), "values", "finite"),
    "rank": (partial(setting, "r", 8), "rank", "another rank than the config"),
    "feature": (partial(setting, "use_qalora", True), "config", "use_qalora=True"),
    "pissa": (partial(setting, "init_lora_weights", "pissa"), "config", "changes the base"),
}
NOTES: dict[str, tuple[Edit, str, str]] = {
    "zero": (partial(changed, f"{Q}.lora_B.weight", torch.zeros_like), "zero", "1 of 6 updates"),
    "untrained": (all_zero, "zero", "every update is zero"),
    "outlier": (partial(changed, f"{Q}.lora_B.weight", lambda x: 99 * x), "norm", "30 times"),
    "dtypes": (
        partial(changed, f"{Q}.lora_B.weight", bfloat16),
        "dtype",
        "bfloat16, float32",
    ),
    "unknown": (partial(added, f"{Q}.extra"), "unknown", "q_proj.extra"),
    "wide": (too_wide, "rank", r"v_proj \(40 > 32\)"),
    "pattern": (partial(setting, "rank_pattern", {"gate_proj": 2}), "targets", "gate_proj"),
    "target": (
        partial(setting, "target_modules", ["q_proj", "v_proj", "down_proj", "lm_head"]),
        "targets",
        "target_modules names lm_head",
    ),
    "left out": (
        partial(setting, "target_modules", ["q_proj", "v_proj"]),
        "targets",
        "2 updates are not among target_modules",
    ),
    "regex": (partial(setting, "target_modules", r".*\.q_proj"), "targets", "4 updates are not"),
    "scale": (
        partial(setting, "alpha_pattern", {"q_proj": 32}),
        "vllm",
        "2 updates at another scale, such as .*q_proj at 2 instead of 8",
    ),
    "bias": (partial(setting, "bias", "all"), "vllm", "does not support trained biases"),
}


@pytest.mark.parametrize(("edit", "kind", "text"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found(edited: Callable[[Edit], Path], edit: Edit, kind: str, text: str) -> None:
    report = inspect_adapter(edited(edit))
    [found] = [each for each in report.anomalies if each.is_damage]
    assert found.kind == kind
    assert text in found.text


@pytest.mark.parametrize(("edit", "kind", "text"), NOTES.values(), ids=NOTES.keys())
def test_what_is_unusual_is_found(
    edited: Callable[[Edit], Path], edit: Edit, kind: str, text: str
) -> None:
    [found] = inspect_adapter(edited(edit)).anomalies
    assert (found.kind, found.is_damage) == (kind, False)
    assert re.search(text, found.text), found.text


def test_entries_larger_than_any_weight_are_found(edited: Callable[[Edit], Path]) -> None:
    def enlarge(tensors: Tensors, values: Values) -> None:
        for key in tensors:
            tensors[key] = 30 * tensors[key]

    [found] = inspect_adapter(edited(enlarge)).anomalies
    assert "6 updates have entries above 1" in found.text


def test_keys_of_another_layout_are_found(edited: Callable[[Edit], Path]) -> None:
    def wrap(tensors: Tensors, values: Values) -> None:
        for key in list(tensors):
            tensors[f"module.{key}".replace(".weight", ".default.weight")] = tensors.pop(key)

    report = inspect_adapter(edited(wrap))
    assert [each.kind for each in report.anomalies] == ["keys", "keys"]
    assert "'default'" in report.anomalies[0].text
