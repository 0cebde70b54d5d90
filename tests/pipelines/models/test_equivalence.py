"""A reader is used only if it agrees with the model's own forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core import LoraConfig, inject
from lora_core.training import attention
from pipelines.errors import BaseModelError
from pipelines.models import equivalence, head, tolerances
from pipelines.models.equivalence import first_look, verified_reader
from pipelines.models.forward import PackReader
from pipelines.models.measurement import Probe
from pipelines.models.packs import Pack
from pipelines.models.support import enable_checkpointing
from pipelines.runtime.interfaces.verified import Verified

Family = Callable[..., PreTrainedModel]
SEED = 1


def adapted(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    inject(model, LoraConfig(r=2, lora_alpha=4), seed=SEED)
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def verify(model: PreTrainedModel, pack: Pack) -> tuple[PackReader, Verified]:
    return verified_reader(model, [Probe(pack, gradient=True)], trained=adapted(model))


def test_a_reader_that_agrees_is_used_and_its_differences_are_kept(
    family: Family, examples_pack: Pack
) -> None:
    reader, found = verify(family("gemma2"), examples_pack)
    assert reader.packed
    assert (found.path, found.own_head, found.rejected) == ("packed", False, ())
    assert (found.examples, found.longest) == (4, 40)
    assert found.loss_difference < 1e-5
    assert found.gradient_difference is not None and found.gradient_difference < 1e-4
    assert "fast path (packed) matches the model's own forward" in str(found)
    assert "4 examples of up to 40 tokens" in str(found)


def test_a_window_that_is_ignored_is_detected(
    family: Family, examples_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every mask causal, as if windows were ignored, examples are read one at a time."""
    monkeypatch.setattr(attention, "_within", lambda segment, visible: segment.mask)
    reader, found = verify(family("mistral"), examples_pack)
    assert not reader.packed
    assert "packed with the head in closed form differs by" in found.rejected[0]
    assert "slow path (one example at a time) matches" in str(found)
    short = examples_pack.pieces()[3]  # 4 tokens, inside any window
    assert verified_reader(family("mistral"), [Probe(short)])[0].packed


def test_a_head_with_an_unknown_term_is_computed_by_the_model(
    family: Family, examples_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "DIVISORS", ())
    reader, found = verify(family("granite"), examples_pack)
    assert reader.packed and reader.head is None and found.own_head
    monkeypatch.undo()
    assert verify(family("granite"), examples_pack)[0].head is not None


def test_a_difference_of_gradients_alone_is_detected(
    family: Family, examples_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses agree to the bit; a wrong backward pass shows in the gradients only."""
    loss = PackReader.loss

    def detached(reader: PackReader, pack: Pack) -> Tensor:
        found = loss(reader, pack)
        return found / 2 + found.detach() / 2 if reader.packed else found

    monkeypatch.setattr(PackReader, "loss", detached)
    _, found = verify(family("llama"), examples_pack)
    assert found.path == "one by one" and "gradients by 5.0e-01" in found.rejected[0]


def test_a_difference_in_training_mode_alone_is_detected(
    family: Family, examples_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are recomputed in the backward pass in training mode only."""
    rows = PackReader._packed

    def scaled(reader: PackReader, pack: Pack) -> Tensor:
        return rows(reader, pack) * (1.1 if reader.model.training else 1.0)

    monkeypatch.setattr(PackReader, "_packed", scaled)
    assert verify(family("llama"), examples_pack)[1].path == "one by one"
    _, found = verify(family("llama", attention_dropout=0.1), examples_pack)
    assert found.path == "packed"  # a random forward is verified in evaluation mode


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # its other name is newer than 5.20
def test_checkpointed_blocks_are_compared(family: Family, examples_pack: Pack) -> None:
    model = family("gemma2")
    enable_checkpointing(model)
    _, found = verify(model, examples_pack)
    assert found.path == "packed"
    assert found.gradient_difference is not None and found.gradient_difference < 1e-4


def model_with_a_layer_for_scoring_only(family: Family) -> PreTrainedModel:
    """Return a model that adds the output of a spare layer unless it is in training mode."""
    model = family("llama")
    block = model.model.layers[0].self_attn
    size = model.config.hidden_size
    block.spare_proj = nn.Linear(block.o_proj.in_features, size, bias=False)

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output if module.training else output + block.spare_proj(args[0])

    block.o_proj.register_forward_hook(add)
    return model


def test_an_adapter_that_is_bypassed_in_training_is_refused(
    family: Family, examples_pack: Pack
) -> None:
    """It starts at zero, so that no loss shows it; a tensor without a gradient does."""
    model = model_with_a_layer_for_scoring_only(family)
    with torch.no_grad():
        model.model.layers[0].self_attn.spare_proj.weight.zero_()
    with pytest.raises(BaseModelError, match=r"does not use .*spare_proj.*exclude_modules"):
        verify(model, examples_pack)


def test_a_weight_that_its_parent_reads_directly_is_adapted(
    family: Family, examples_pack: Pack
) -> None:
    """Gemma 3n multiplies by the weight of its correction coefficients."""
    model = family("gemma3n_text")
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=("correction_coefs",)), seed=SEED)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    _, found = verified_reader(model, [Probe(examples_pack, gradient=True)], trained=trained)
    assert not found.without_gradient


def test_a_family_that_fails_in_training_mode_is_refused(
    family: Family, examples_pack: Pack
) -> None:
    model = family("llama")

    def fail(module: nn.Module, _: object) -> None:
        assert not module.training, "inference only"

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(BaseModelError, match=r"no way of reading .*'llama' .* inference only"):
        verify(model, examples_pack)


def test_weights_that_are_not_finite_and_not_used_are_no_change(
    family: Family, examples_pack: Pack
) -> None:
    """As in rows of an embedding that pad a vocabulary."""
    model = family("llama", tie_word_embeddings=False)
    unused = max(set(range(model.config.vocab_size)) - set(examples_pack.input_ids.tolist()))
    with torch.no_grad():
        model.model.embed_tokens.weight[unused] = torch.nan
    assert verify(model, examples_pack)[1].path == "packed"


def test_a_family_that_writes_to_frozen_weights_in_training_is_refused(
    family: Family, examples_pack: Pack
) -> None:
    model = family("llama")
    layer = model.model.layers[0]

    def clamp(*_: object) -> None:
        if layer.training:
            layer.input_layernorm.weight.data.clamp_(-0.5, 0.5)

    layer.register_forward_pre_hook(clamp)
    weight = r"model\.layers\.0\.input_layernorm\.weight"
    message = f"'llama' changes 1 weights .* {weight}; set base_model"
    with pytest.raises(BaseModelError, match=message):
        verify(model, examples_pack)
    verified_reader(model, [Probe(examples_pack)])  # scoring is not in training mode


def test_a_recurrent_state_is_not_packed(family: Family, examples_pack: Pack) -> None:
    reader, found = verify(family("lfm2"), examples_pack)
    assert not reader.packed and found.rejected == ("not packed: lfm2 has layers of kind conv",)


def test_an_undeclared_recurrent_state_is_detected(
    family: Family, examples_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence, "why_not_packed", lambda model: None)
    reader, found = verify(family("lfm2"), examples_pack)
    assert not reader.packed and "packed with" in found.rejected[0]


def test_a_model_that_reads_the_future_is_refused(family: Family, examples_pack: Pack) -> None:
    model = family("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config.is_causal = False
    message = (
        "'llama' is not a causal language model: "
        "a token's logits change by .* with the tokens after it"
    )
    with pytest.raises(BaseModelError, match=message):
        verified_reader(model, [Probe(examples_pack)])


def test_weights_that_are_not_finite_are_refused(family: Family, examples_pack: Pack) -> None:
    model = family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(BaseModelError, match="gives a loss that is not finite"):
        verified_reader(model, [Probe(examples_pack)])


def test_weights_that_do_not_affect_the_loss_are_named(family: Family, examples_pack: Pack) -> None:
    model = family("gpt2")
    model.transformer.unused = nn.Linear(2, 2)
    trained = dict(model.named_parameters())
    _, found = verified_reader(model, [Probe(examples_pack, gradient=True)], trained=trained)
    assert found.without_gradient == ("transformer.unused.weight", "transformer.unused.bias")
    _, found = verified_reader(model, [Probe(examples_pack)], trained=trained)
    assert found.without_gradient == ()


def test_the_model_is_unchanged_by_the_verification(family: Family, examples_pack: Pack) -> None:
    model = family("llama")
    trained = adapted(model.train())
    state = torch.get_rng_state()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    verified_reader(model, [Probe(examples_pack, gradient=True)], trained=trained)
    assert model.training and all(parameter.grad is None for parameter in trained.values())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], parameter) for name, parameter in trained.items())


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "mamba2"])
def test_a_base_is_verified_before_there_is_data(family: Family, name: str) -> None:
    found = first_look(family(name))
    assert found.loss_difference < 1e-5 and found.gradient_difference is None


def test_16_bits_have_a_larger_tolerance(family: Family, examples_pack: Pack) -> None:
    model = family("llama").to(torch.bfloat16)
    _, found = verified_reader(model, [Probe(examples_pack)])
    assert found.loss_tolerance == tolerances.IN_16_BITS.loss
    assert found.loss_tolerance > tolerances.TOLERANCES[torch.float32].loss
    masters = family("llama")
    _, found = verified_reader(
        masters,
        [Probe(examples_pack, gradient=True)],
        trained=dict(masters.named_parameters()),
        dtype=torch.bfloat16,
    )
    assert found.path == "packed" and found.loss_difference > 1e-6  # it was computed in bfloat16


def test_a_sentence_describes_the_verification() -> None:
    found = Verified(
        path="one by one",
        own_head=False,
        examples=1,
        longest=1200,
        loss_difference=3e-7,
        gradient_difference=None,
        loss_tolerance=1e-4,
        gradient_tolerance=1e-3,
        rejected=("not packed: it has a state",),
    )
    assert str(found) == (
        "slow path (one example at a time) matches the model's own forward: "
        "3e-07 nats per token on 1 example of up to 1,200 tokens; not packed: it has a state"
    )
