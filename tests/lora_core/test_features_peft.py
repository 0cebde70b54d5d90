"""Every feature agrees with PEFT in both directions: same files, same logits, same gradients.

The cases cover several kinds of models and storage. Cases and measurements are those of `make
parity`.
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
    # PEFT does not expect the bias of B.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:There are multiple adapter keys:UserWarning"),
    # PEFT warns when it subtracts its initialization.
    pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning"),
]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
CONVERTED = {name: case for name, case in CASES.items() if case.converts_in_peft}
PLAIN = {name: case for name, case in CASES.items() if not case.is_spectral}


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_step_0_equals_base(case: Case, training: bool) -> None:
    model = case.base().train(training)
    config = case.config
    before = case.logits(model)
    identity = fingerprint(model)
    inject(model, config, seed=1)
    after = case.logits(model)
    # Exact, unless DoRA divides rows by their norm or the initial pair is subtracted.
    is_exact = config.init_lora_weights in ("kaiming", "gaussian") and not config.use_dora
    if is_exact:
        assert torch.equal(after, before)
    else:
        assert parts_of_largest(after, before) <= case.tolerance.logits
    assert fingerprint(model) == identity


@each_case
def test_our_file_gives_same_logits_in_peft(case: Case, tmp_path: Path) -> None:
    assert ours_in_peft(case, tmp_path) <= case.tolerance.logits
    assert effect(case, tmp_path) > 10 * case.tolerance.logits


@pytest.mark.parametrize("case", CONVERTED.values(), ids=CONVERTED.keys())
def test_peft_file_gives_same_logits_here(case: Case, tmp_path: Path) -> None:
    assert pefts_here(case, tmp_path) <= case.tolerance.logits


@each_case
def test_peft_round_trip_of_our_file_is_bit_exact(case: Case, tmp_path: Path) -> None:
    model = adapted(case, tmp_path / "ours")
    PeftModel.from_pretrained(case.base(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    reloaded = case.base()
    load_adapter(reloaded, tmp_path / "theirs")
    assert torch.equal(case.logits(reloaded), case.logits(model))


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN.keys())
def test_gradients_match_peft(case: Case, tmp_path: Path) -> None:
    assert gradients(case, tmp_path) <= case.tolerance.gradients


@each_case
def test_only_adapter_gets_gradients(case: Case) -> None:
    model = case.base()
    inject(model, case.config, seed=1)
    case.logits(model).sum().backward()
    expected = {id(p) for p in trained(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected
    assert all(p.grad is None for p in model.parameters() if id(p) not in expected)


@each_case
def test_merge_keeps_logits_and_unmerge_restores_model(case: Case) -> None:
    model = case.base()
    config = case.config
    if kind_of(model) != "dense" or case.tolerance != FLOAT32:
        pytest.skip("a merge rounds to the dtype of the base; test_merge.py covers that")
    if config.lora_bias:
        pytest.skip("a bias in B cannot be merged into layers without one")
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    inject(model, config, seed=1)
    shake(trained(model))
    before = case.logits(model)
    state = {key: p.detach().clone() for key, p in trained(model).items()}
    merged = merge(model)
    assert not list(adapter_parts(model))
    assert parts_of_largest(case.logits(model), before) <= case.tolerance.logits
    unmerge(model, merged)
    assert torch.equal(case.logits(model), before)
    assert all(torch.equal(p, state[key]) for key, p in trained(model).items())
    for name, part in adapter_parts(model):
        for parameter_name, value in part.base.named_parameters():
            assert torch.equal(value, bits[f"{name}.{parameter_name}"])
