"""Retention after a merge, checked by hand, by the NF4 table of codes and by real merges."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_core import AdapterError, Identity, LoraConfig, inject, lora_layers, merge, save_adapter
from lora_core.base.nf4 import Nf4Settings, round_to_nf4
from lora_core.base.quant import base_weight
from lora_core.merging.fidelity import STORAGES, logit_divergence, measure_retention, merge_fidelity

Build = Callable[..., LlamaForCausalLM]
# The 16 codes of NF4, QLoRA (arXiv 2305.14314), appendix E.
NEGATIVE = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
NF4_CODES = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])


def nf4_by_table(weight: Tensor) -> Tensor:
    """Round blocks of 64 to the nearest code times the largest magnitude of the block."""
    blocks = weight.double().view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / largest).unsqueeze(-1).sub(NF4_CODES.double()).abs().argmin(dim=-1)
    return (NF4_CODES.double()[nearest] * largest).view_as(weight).float()


def random_pair(size: float, shape: tuple[int, int] = (256, 512)) -> tuple[Tensor, Tensor]:
    """Return a normally distributed weight and a rank-8 update of the relative size `size`."""
    weight = torch.randn(shape)
    update = torch.randn(shape[0], 8) @ torch.randn(8, shape[1])
    return weight, update * (size * weight.norm() / update.norm())


@pytest.fixture
def saved(build_llama: Build, randomize: Callable[[nn.Module], None], tmp_path: Path) -> Path:
    """The folder of an adapter of the tiny Llama, dense or 4-bit."""
    model = build_llama()
    config = LoraConfig(r=4, lora_alpha=8)
    inject(model, config, seed=0)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", config, Identity())
    return tmp_path / "adapter"


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0, 2.0])
def test_fraction_of_the_update_is_measured(fraction: float) -> None:
    base, delta = random_pair(0.1)
    found = measure_retention(delta, base=base, merged=base + fraction * delta)
    assert found.fraction == pytest.approx(fraction, abs=1e-6)
    # The sum is rounded to float32.
    assert found.relative_error == pytest.approx(abs(fraction - 1), abs=1e-5)
    assert found.relative_size == pytest.approx(0.1, rel=1e-5)


def test_noise_orthogonal_to_the_update_counts_only_as_error() -> None:
    delta = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    noise = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    found = measure_retention(delta, base=torch.zeros(2, 2), merged=delta + noise)
    assert (found.fraction, found.relative_error, found.relative_size) == (1.0, 1.0, math.inf)


def test_zero_update_is_fully_retained_if_nothing_changed() -> None:
    base = torch.ones(2, 2)
    zero = torch.zeros(2, 2)
    unchanged = measure_retention(zero, base=base, merged=base)
    assert unchanged.relative_error == 0
    assert unchanged.fraction == 1
    assert measure_retention(zero, base=base, merged=2 * base).relative_error == math.inf


def test_overflow_gives_nan_fraction_and_infinite_error() -> None:
    base = torch.ones(2, 2)
    delta = torch.full((2, 2), 1e6)
    found = measure_retention(delta, base=base, merged=(base + delta).half().float())
    assert math.isnan(found.fraction) and found.relative_error == math.inf


def test_nf4_rounds_to_the_nearest_code_of_the_table() -> None:
    weight = torch.randn(64, 128)
    found = round_to_nf4(weight, Nf4Settings(double=False))
    torch.testing.assert_close(found, nf4_by_table(weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "fraction", "tolerance"),
    [(0.001, 1 / 64, 0.003), (0.01, 1 / 64, 0.003), (0.05, 0.31, 0.05), (0.2, 0.98, 0.02)],
)
def test_nf4_rounds_away_small_updates_of_quantized_weights(
    size: float, fraction: float, tolerance: float
) -> None:
    """A weight on a code is rounded back to it unless the update reaches half way to the next.

    Only the largest weight of each block of 64 keeps its update in full: it is the scale. The two
    larger fractions were measured.
    """
    weight, update = random_pair(size)
    base = nf4_by_table(weight)
    found = measure_retention(update, base=base, merged=nf4_by_table(base + update))
    assert found.fraction == pytest.approx(fraction, abs=tolerance)
    base = round_to_nf4(weight, Nf4Settings())
    found = measure_retention(update, base=base, merged=round_to_nf4(base + update, Nf4Settings()))
    assert found.fraction < fraction + tolerance  # a rounded scale loses more


def test_nf4_retains_updates_of_an_original_weight_on_average() -> None:
    """Original weights are anywhere between two codes, so some always cross over.

    The noise is nine times the update.
    """
    weight, update = random_pair(0.01, (1024, 1024))
    found = measure_retention(update, base=weight, merged=nf4_by_table(weight + update))
    assert found.fraction == pytest.approx(1, abs=0.05)
    assert found.relative_error == pytest.approx(9.2, rel=0.05)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=str)
def test_rounding_error_follows_from_the_number_of_digits(dtype: torch.dtype, digits: int) -> None:
    """Rounding to n binary digits is uniform within half a unit.

    That is 2⁻ⁿ/√3 of a power of two, and about 0.7 of it for a normally distributed value.
    """
    weight, update = random_pair(0.01)
    found = measure_retention(update, base=weight, merged=(weight + update).to(dtype).float())
    assert found.relative_error == pytest.approx(0.73 * 2.0**-digits / math.sqrt(3) / 0.01, rel=0.1)
    assert found.fraction == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_report_matches_a_real_merge(
    build_llama: Build, saved: Path, randomize: Callable[..., None], dtype: str
) -> None:
    base = build_llama()
    rows = {row.layer: row for row in merge_fidelity(base, saved, storages=(dtype,))}
    model = build_llama(dtype=getattr(torch, dtype))
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    randomize(model)
    deltas = {name: layer.delta() for name, layer in lora_layers(model)}
    merge(model)
    assert rows.keys() == deltas.keys()
    for name, delta in deltas.items():
        merged = model.get_submodule(name).weight.float()
        expected = measure_retention(delta, base=base.get_submodule(name).weight, merged=merged)
        assert (rows[name].base, rows[name].retention) == ("original", expected)


def test_report_covers_a_4_bit_base_and_its_original(
    build_nf4_llama: Build, build_llama: Build, saved: Path, randomize: Callable[..., None]
) -> None:
    rows = merge_fidelity(build_nf4_llama(), saved, original=build_llama())
    assert len(rows) == 14 * 2 * len(STORAGES)
    found = {(row.layer, row.base, row.storage): row.retention for row in rows}
    model = build_nf4_llama()
    inject(model, LoraConfig(r=4, lora_alpha=8), seed=0)
    randomize(model)
    report = merge(model, force=True).retention
    assert len(report) == 14
    for name, retention in report.items():
        assert retention == found[name, "dequantized", "nf4"]
        # For the original, the rounding of the base counts as well.
        assert found[name, "original", "nf4"].relative_error > 0.5 * retention.relative_error
        assert found[name, "original", "float32"].relative_error < 1e-5


def test_models_do_not_change(
    build_nf4_llama: Build,
    build_llama: Build,
    saved: Path,
    state_of: Callable[..., dict[str, Tensor]],
    assert_same_state: Callable[..., None],
) -> None:
    model = build_nf4_llama()
    original = build_llama()
    state = state_of(model)
    original_state = state_of(original)
    merge_fidelity(model, saved, original=original)
    assert_same_state(state_of(model), state)
    assert_same_state(state_of(original), original_state)


def test_quantization_settings_of_the_layer_are_used(llama_folder: Path, saved: Path) -> None:
    """Without double quantization the scales are exact: a zero update changes nothing."""
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
    assert torch.equal(round_to_nf4(dense, Nf4Settings(double=False)), dense)
    assert not torch.equal(round_to_nf4(dense, Nf4Settings(double=True)), dense)
    delta_rows = merge_fidelity(model, saved, storages=("nf4",))
    assert delta_rows[0].base == "dequantized"


@pytest.mark.parametrize(
    "settings",
    [{"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}],
    ids=["fp4", "int8"],
)
def test_quantized_base_is_not_reported_as_original(
    llama_folder: Path, saved: Path, settings: dict[str, Any]
) -> None:
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    rows = merge_fidelity(model, saved, storages=("float32",))
    assert {row.base for row in rows} == {"dequantized"}


def test_adapter_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"model.layers.0.mlp.down_proj is not a linear layer"):
        merge_fidelity(nn.Linear(8, 8), saved)


def test_layer_of_another_shape_is_refused(build_llama: Build, saved: Path) -> None:
    model = build_llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 100)
    with pytest.raises(
        AdapterError,
        match=r"update of model.layers.1.mlp.up_proj is \(128, 64\) and the weight \(100, 64\)",
    ):
        merge_fidelity(model, saved)


def test_divergence_agrees_with_torch_distributions() -> None:
    """600 rows are more than one chunk."""
    p = torch.randn(600, 40)
    q = torch.randn(600, 40)
    divergences = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()),
        torch.distributions.Categorical(logits=q.double()),
    )
    expected = pytest.approx(divergences.mean().item(), rel=1e-5)
    assert logit_divergence(p, q) == expected
    assert logit_divergence(p.view(2, 300, 40), q.view(2, 300, 40)) == expected


def test_divergence_of_equal_or_shifted_logits_is_zero() -> None:
    logits = torch.randn(7, 40)
    assert logit_divergence(logits, logits) == 0
    assert logit_divergence(logits, logits + 3) == pytest.approx(0, abs=1e-6)
    assert logit_divergence(logits.bfloat16(), logits.bfloat16()) == 0


def test_divergence_ignores_impossible_tokens_and_is_infinite_for_excluded_ones() -> None:
    p = torch.tensor([[0.0, 0.0, -math.inf]])
    q = torch.tensor([[0.0, 0.0, 0.0]])
    assert logit_divergence(p, q) == pytest.approx(math.log(3 / 2))
    assert logit_divergence(p, p) == 0
    assert logit_divergence(q, p) == math.inf


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((0, 3), (0, 3))], ids=str)
def test_logits_that_cannot_be_compared_are_refused(
    shapes: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        logit_divergence(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
