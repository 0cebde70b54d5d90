"""What a merge keeps: the definitions by hand, NF4 against its table of codes, and the report against real merges."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_core import AdapterError, Identity, LoraConfig, inject, lora_layers, merge, save_adapter
from lora_core.base.nf4 import Nf4Settings, rounded_to_nf4
from lora_core.base.quant import base_weight
from lora_core.merging.fidelity import STORAGES, kept, logit_divergence, merge_fidelity

Build = Callable[..., LlamaForCausalLM]
# The 16 codes of NF4, QLoRA (arXiv 2305.14314), appendix E.
NEGATIVE = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
NF4_CODES = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])


def nf4_by_the_table(weight: Tensor) -> Tensor:
    """Round blocks of 64 to the nearest code times the largest size of the block."""
    blocks = weight.double().view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / largest).unsqueeze(-1).sub(NF4_CODES.double()).abs().argmin(dim=-1)
    return (NF4_CODES.double()[nearest] * largest).view_as(weight).float()


def random_pair(size: float, shape: tuple[int, int] = (256, 512)) -> tuple[Tensor, Tensor]:
    """Return a normal weight and an update of rank 8 of the relative size `size`."""
    weight = torch.randn(shape)
    update = torch.randn(shape[0], 8) @ torch.randn(8, shape[1])
    return weight, update * (size * weight.norm() / update.norm())


@pytest.fixture
def saved(build_llama: Build, randomise: Callable[[nn.Module], None], tmp_path: Path) -> Path:
    """The folder of an adapter of the tiny Llama, dense or 4-bit."""
    model, config = build_llama(), LoraConfig(r=4, lora_alpha=8)
    inject(model, config, seed=0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    return tmp_path / "adapter"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, 2.0])
def test_a_share_of_the_update_is_that_fraction(share: float) -> None:
    base, delta = random_pair(0.1)
    found = kept(delta, base=base, merged=base + share * delta)
    assert found.fraction == pytest.approx(share, abs=1e-6)
    assert found.relative_error == pytest.approx(
        abs(share - 1), abs=1e-5
    )  # the sum is rounded to float32
    assert found.relative_size == pytest.approx(0.1, rel=1e-5)


def test_noise_beside_the_update_is_error_and_no_fraction() -> None:
    base, delta = torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    found = kept(delta, base=base, merged=delta + torch.tensor([[0.0, 5.0], [0.0, 0.0]]))
    assert (found.fraction, found.relative_error, found.relative_size) == (1.0, 1.0, math.inf)


def test_an_update_of_zero_is_kept_where_nothing_changed() -> None:
    base, nothing = torch.ones(2, 2), torch.zeros(2, 2)
    assert kept(nothing, base=base, merged=base).relative_error == 0
    assert kept(nothing, base=base, merged=base).fraction == 1
    assert kept(nothing, base=base, merged=2 * base).relative_error == math.inf


def test_a_storage_that_overflows_keeps_nothing_that_could_be_said() -> None:
    base, delta = torch.ones(2, 2), torch.full((2, 2), 1e6)
    found = kept(delta, base=base, merged=(base + delta).half().float())
    assert math.isnan(found.fraction) and found.relative_error == math.inf


def test_nf4_is_the_nearest_code_of_the_table() -> None:
    weight = torch.randn(64, 128)
    torch.testing.assert_close(
        rounded_to_nf4(weight, Nf4Settings(double=False)),
        nf4_by_the_table(weight),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("size", "fraction", "tolerance"),
    [(0.001, 1 / 64, 0.003), (0.01, 1 / 64, 0.003), (0.05, 0.31, 0.05), (0.2, 0.98, 0.02)],
)
def test_nf4_rounds_small_updates_of_its_own_codes_away(
    size: float, fraction: float, tolerance: float
) -> None:
    """A weight on a code is rounded back to it, unless the update carries it half the way to the next.

    Only the largest weight of a block of 64 takes part in full: it is the scale. The two larger fractions were measured.
    """
    weight, update = random_pair(size)
    base = nf4_by_the_table(weight)
    assert kept(
        update, base=base, merged=nf4_by_the_table(base + update)
    ).fraction == pytest.approx(fraction, abs=tolerance)
    base = rounded_to_nf4(weight, Nf4Settings())
    found = kept(update, base=base, merged=rounded_to_nf4(base + update, Nf4Settings()))
    assert found.fraction < fraction + tolerance  # a scale that is rounded itself loses more


def test_rounded_from_the_original_weight_an_update_is_kept_on_average() -> None:
    """Such a weight lies anywhere between two codes, so that some are always carried over; but the noise is nine times the update."""
    weight, update = random_pair(0.01, (1024, 1024))
    found = kept(update, base=weight, merged=nf4_by_the_table(weight + update))
    assert found.fraction == pytest.approx(1, abs=0.05)
    assert found.relative_error == pytest.approx(9.2, rel=0.05)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=str)
def test_the_error_of_a_rounding_follows_from_its_digits(dtype: torch.dtype, digits: int) -> None:
    """A rounding to n binary digits is uniform within half a unit: 2⁻ⁿ/√3 of a power of two, about 0.7 of that of a normal value."""
    weight, update = random_pair(0.01)
    found = kept(update, base=weight, merged=(weight + update).to(dtype).float())
    assert found.relative_error == pytest.approx(0.73 * 2.0**-digits / math.sqrt(3) / 0.01, rel=0.1)
    assert found.fraction == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_report_is_what_a_real_merge_keeps(
    build_llama: Build, saved: Path, randomise: Callable[..., None], dtype: str
) -> None:
    base = build_llama()
    rows = {row.layer: row for row in merge_fidelity(base, saved, storages=(dtype,))}
    model = build_llama(dtype=getattr(torch, dtype))
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    randomise(model)
    deltas = {name: layer.delta() for name, layer in lora_layers(model)}
    merge(model)
    assert rows.keys() == deltas.keys()
    for name, delta in deltas.items():
        merged = model.get_submodule(name).weight.float()
        expected = kept(delta, base=base.get_submodule(name).weight, merged=merged)
        assert (rows[name].base, rows[name].kept) == ("original", expected)


def test_a_4_bit_base_is_reported_beside_its_original(
    build_nf4_llama: Build, build_llama: Build, saved: Path, randomise: Callable[..., None]
) -> None:
    rows = merge_fidelity(build_nf4_llama(), saved, original=build_llama())
    assert len(rows) == 14 * 2 * len(STORAGES)
    found = {(row.layer, row.base, row.storage): row.kept for row in rows}
    model = build_nf4_llama()
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    randomise(model)
    report = merge(model, force=True).kept
    assert (
        report == {name: found[name, "dequantised", "nf4"] for name in report} and len(report) == 14
    )
    for name in report:
        # Over the original, the rounding of the base counts as well.
        assert (
            found[name, "original", "nf4"].relative_error
            > 0.5 * found[name, "dequantised", "nf4"].relative_error
        )
        assert found[name, "original", "float32"].relative_error < 1e-5


def test_no_model_is_changed(
    build_nf4_llama: Build,
    build_llama: Build,
    saved: Path,
    state_of: Callable[..., dict[str, Tensor]],
    assert_same_state: Callable[..., None],
) -> None:
    model, original = build_nf4_llama(), build_llama()
    before = [state_of(each) for each in (model, original)]
    merge_fidelity(model, saved, original=original)
    for each, state in zip((model, original), before, strict=True):
        assert_same_state(state_of(each), state)


def test_settings_of_the_layer_are_used(llama_folder: Path, saved: Path) -> None:
    """Without double quantisation the scales are exact: an update of zero comes back as it was."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=settings, dtype=torch.float32
    ).train()
    weight = base_weight(model.model.layers[0].self_attn.q_proj)
    assert weight is not None
    dense = weight.dense(torch.float32)
    assert torch.equal(rounded_to_nf4(dense, Nf4Settings(double=False)), dense)
    assert not torch.equal(rounded_to_nf4(dense, Nf4Settings(double=True)), dense)
    delta_rows = merge_fidelity(model, saved, storages=("nf4",))
    assert delta_rows[0].base == "dequantised"


@pytest.mark.parametrize(
    "settings",
    [{"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}],
    ids=["fp4", "int8"],
)
def test_no_quantised_base_passes_for_the_original(
    llama_folder: Path, saved: Path, settings: dict[str, Any]
) -> None:
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    assert {row.base for row in merge_fidelity(model, saved, storages=("float32",))} == {
        "dequantised"
    }


def test_an_adapter_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"model.layers.0.mlp.down_proj is no linear layer"):
        merge_fidelity(nn.Linear(8, 8), saved)


def test_a_layer_of_another_shape_is_refused(build_llama: Build, saved: Path) -> None:
    model = build_llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 100)
    with pytest.raises(
        AdapterError,
        match=r"update of model.layers.1.mlp.up_proj is \(128, 64\) and the weight \(100, 64\)",
    ):
        merge_fidelity(model, saved)


def test_divergence_is_that_of_the_distributions() -> None:
    """torch.distributions is the reference; 600 rows are more than are held at once."""
    p, q = torch.randn(600, 40), torch.randn(600, 40)
    reference = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()),
        torch.distributions.Categorical(logits=q.double()),
    )
    assert logit_divergence(p, q) == pytest.approx(reference.mean().item(), rel=1e-5)
    assert logit_divergence(p.view(2, 300, 40), q.view(2, 300, 40)) == pytest.approx(
        reference.mean().item(), rel=1e-5
    )


def test_divergence_of_equals_is_zero_and_a_shift_does_not_count() -> None:
    logits = torch.randn(7, 40)
    assert logit_divergence(logits, logits) == 0
    assert logit_divergence(logits, logits + 3) == pytest.approx(0, abs=1e-6)
    assert logit_divergence(logits.bfloat16(), logits.bfloat16()) == 0


def test_an_impossible_word_adds_nothing_and_an_excluded_one_everything() -> None:
    p, q = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert logit_divergence(p, q) == pytest.approx(math.log(3 / 2))
    assert logit_divergence(p, p) == 0
    assert logit_divergence(q, p) == math.inf


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((0, 3), (0, 3))], ids=str)
def test_logits_that_cannot_be_compared_are_refused(
    shapes: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        logit_divergence(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
