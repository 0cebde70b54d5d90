"""Every feature against PEFT, on several kinds of model and of storage, both ways: same files, same logits, same gradients.

The cases and the measurements are those of `make parity`.
"""

from pathlib import Path

import pytest
import torch
from parity.cases import CASES, FLOAT32, Case
from parity.features import (
    adapted,
    effect,
    gradients,
    ours_in_peft,
    parts_of_largest,
    pefts_here,
    shake,
    trained,
)
from peft import PeftModel

from lora_core import fingerprint, inject, load_adapter, merge, unmerge
from lora_core.base.quant import kind_of
from lora_core.modules import adapter_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. .* have invalid shape:UserWarning"
    ),  # it knows no bias of B
    pytest.mark.filterwarnings("ignore:There are multiple adapter keys:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.* changes the base weights of the model:UserWarning"
    ),  # while it takes its own start off
]
each_case = pytest.mark.parametrize("one", CASES.values(), ids=CASES.keys())
CONVERTED = {name: one for name, one in CASES.items() if one.converts_in_peft}
PLAIN = {name: one for name, one in CASES.items() if not one.is_spectral}


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_step_0_is_the_base_bit_for_bit(one: Case, training: bool) -> None:
    model, config = one.base().train(training), one.config
    before, identity = one.logits(model), fingerprint(model)
    inject(model, config, seed=1)
    after = one.logits(model)
    if config.use_dora or config.init_lora_weights not in (
        "kaiming",
        "gaussian",
    ):  # a row over its own length, or a start less itself
        assert parts_of_largest(after, before) <= one.tolerance.logits
    else:
        assert torch.equal(after, before)
    assert fingerprint(model) == identity


@each_case
def test_peft_computes_the_same_from_our_file(one: Case, tmp_path: Path) -> None:
    assert ours_in_peft(one, tmp_path) <= one.tolerance.logits
    assert effect(one, tmp_path) > 10 * one.tolerance.logits


@pytest.mark.parametrize("one", CONVERTED.values(), ids=CONVERTED.keys())
def test_we_compute_the_same_from_pefts_file(one: Case, tmp_path: Path) -> None:
    assert pefts_here(one, tmp_path) <= one.tolerance.logits


@each_case
def test_what_peft_saves_of_our_file_is_our_file(one: Case, tmp_path: Path) -> None:
    model = adapted(one, tmp_path / "ours")
    PeftModel.from_pretrained(one.base(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = one.base()
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(one.logits(again), one.logits(model))


@pytest.mark.parametrize("one", PLAIN.values(), ids=PLAIN.keys())
def test_gradients_are_pefts(one: Case, tmp_path: Path) -> None:
    assert gradients(one, tmp_path) <= one.tolerance.gradients


@each_case
def test_only_the_adapter_gets_gradients(one: Case) -> None:
    model = one.base()
    inject(model, one.config, seed=1)
    one.logits(model).sum().backward()
    own = {id(p) for p in trained(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@each_case
def test_merged_it_computes_the_same_and_unmerged_it_is_what_it_was(one: Case) -> None:
    model, config = one.base(), one.config
    if kind_of(model) != "dense" or one.tolerance != FLOAT32:
        pytest.skip("a merge is rounded to what the base is stored in; test_merge.py looks at that")
    if config.lora_bias:
        pytest.skip("a bias in B cannot be merged into layers without one")
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    inject(model, config, seed=1)
    shake(trained(model))
    before, state = (
        one.logits(model),
        {key: p.detach().clone() for key, p in trained(model).items()},
    )
    merged = merge(model)
    assert not list(adapter_parts(model))
    assert parts_of_largest(one.logits(model), before) <= one.tolerance.logits
    unmerge(model, merged)
    assert torch.equal(one.logits(model), before)
    assert all(torch.equal(p, state[key]) for key, p in trained(model).items())
    for name, part in adapter_parts(model):
        for own, value in part.base.named_parameters():
            assert torch.equal(value, bits[f"{name}.{own}"])
