"""A merge into a shared weight changes only the adapted user, can be saved and can be undone."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tied_decoders import gpt2
from tied_models import (
    CASES,
    TieCase,
    adapted,
    base,
    each_case,
    llama,
    logits,
    objects,
    tied_flags,
)
from torch import nn
from trained_noise import add_noise
from transformers import LlamaForCausalLM, PreTrainedModel

from lora_core import LoraConfig, MergeError, inject, load_adapter, merge, unmerge
from lora_core.base.sharing import FLAG, is_head_tied, memory_of
from lora_core.layers.trained import TiedHead, TrainedRows
from lora_core.modules import adapter_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
]

# The sum W0 + s·B·A is rounded to float32 once, and so are 32 products.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def peft_config(one: TieCase) -> PeftLoraConfig:
    settings = {**one.settings, "target_modules": list(one.settings["target_modules"])}
    return PeftLoraConfig(**settings, init_lora_weights=False, fan_in_fan_out=one.build is gpt2)


def shares_weight(model: PreTrainedModel) -> bool:
    """Return whether head and embedding read the same memory."""
    return is_head_tied(model)


def assert_same_objects(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    found = objects(model)
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameter for name, parameter in parameters.items())


@each_case
def test_merged_model_has_the_logits_of_the_adapted_model(one: TieCase) -> None:
    model = adapted(one)
    before = logits(model)
    merge(model)
    assert not list(adapter_parts(model))
    torch.testing.assert_close(logits(model), before, **CLOSE)


@each_case
def test_modules_that_are_not_adapted_keep_their_bits(one: TieCase) -> None:
    model = adapted(one)
    plain = objects(base(one))
    parts = {name for name, _ in adapter_parts(model)}
    merge(model)
    changed = {
        name.rpartition(".")[0]
        for name, value in objects(model).items()
        if not torch.equal(value, plain[name])
    }
    assert changed == parts


@each_case
def test_saved_merged_model_loads_unchanged(one: TieCase, tmp_path: Path) -> None:
    model = adapted(one)
    merge(model)
    assert tied_flags(model) == [one.stays_tied] * 2
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    values = objects(loaded)
    assert all(torch.equal(value, values[name]) for name, value in objects(model).items())


@each_case
def test_unmerge_restores_the_tied_parameter_objects(one: TieCase) -> None:
    model = adapted(one)
    before = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = tied_flags(model)
    parameters = objects(model)
    merged = merge(model)
    assert shares_weight(model) is one.only_rows
    unmerge(model, merged)
    assert tied_flags(model) == flags == [True, True]
    assert torch.equal(logits(model), before)
    assert_same_objects(model, parameters)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "head",
        "embedding",
        "both",
        "dora",
        "dora embedding",
        "gpt2 embedding",
        "bert embedding",
        "umt5 encoder",
    ],
)
def test_merged_model_agrees_with_an_unmerged_peft_adapter(name: str, tmp_path: Path) -> None:
    one = CASES[name]
    theirs = get_peft_model(base(one), peft_config(one)).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = base(one)
    load_adapter(model, tmp_path)
    before = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    torch.testing.assert_close(before, logits(theirs), **CLOSE)
    assert (before - logits(base(one))).abs().max() > 0.1


@pytest.mark.parametrize(
    "trained", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")], ids="+".join
)
def test_parameters_over_one_storage_count_as_tied(
    trained: tuple[str, ...], tmp_path: Path
) -> None:
    """A manual tie or a sharded load can create two parameters over one storage."""
    model = llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data, requires_grad=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=trained), seed=0)
    add_noise(model)
    before = logits(model)
    parameters = objects(model)
    merged = merge(model)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    unmerge(model, merged)
    assert torch.equal(logits(model), before)
    assert model.config.tie_word_embeddings is True
    assert_same_objects(model, parameters)
    assert shares_weight(model)


def test_head_tied_by_storage_uses_the_trained_rows() -> None:
    model = llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data, requires_grad=False)
    inject(model, CASES["rows"].lora, seed=0)
    assert isinstance(model.lm_head, TiedHead) and isinstance(model.model.embed_tokens, TrainedRows)
    add_noise(model)
    before = logits(model)
    merged = merge(model)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    assert shares_weight(model)
    unmerge(model, merged)
    assert torch.equal(logits(model), before)


def test_equal_sized_weights_at_different_addresses_are_not_tied() -> None:
    storage = torch.zeros(8, 4)
    first = nn.Parameter(storage[:4])
    second = nn.Parameter(storage[4:])
    assert memory_of(first) == memory_of(nn.Parameter(storage[:4]))
    assert memory_of(first) != memory_of(second)
    assert memory_of(first) != memory_of(nn.Parameter(storage[:4].T))
    on_meta = [nn.Parameter(torch.empty(4, 4, device="meta")) for _ in range(2)]
    assert memory_of(on_meta[0]) != memory_of(on_meta[1])


def test_failure_after_weights_were_stored_is_undone(refuses: Callable[..., None]) -> None:
    """The config is changed last, and this one is frozen."""

    @dataclass(frozen=True)
    class Frozen:
        tie_word_embeddings: bool = True

    model = adapted(CASES["both"])
    before = logits(model)
    parameters = objects(model)
    config = model.config
    model.config = Frozen()
    refuses(model, lambda: merge(model), FrozenInstanceError, FLAG)
    assert_same_objects(model, parameters)
    model.config = config
    assert torch.equal(logits(model), before)
    assert is_head_tied(model)


def test_module_used_at_two_paths_is_refused(refuses: Callable[..., None]) -> None:
    """The second path computes without the adapter before the merge, but not after it."""
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=("first",)), seed=0)
    refuses(model, lambda: merge(model), MergeError, "first is in the model at another path too")


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ("1",)}, {"bias": "all"}], ids=["module", "bias"]
)
def test_training_the_merged_model_does_not_change_what_unmerge_restores(
    settings: dict[str, Any],
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=("0",), **settings), seed=0)
    add_noise(model)
    state = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    merged = merge(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    unmerge(model, merged)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in state.items())
