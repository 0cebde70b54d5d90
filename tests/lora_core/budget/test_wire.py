"""What ranks send: by hand, and beside what two ranks of the real engines were counted to pass to their collectives."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core import LoraConfig, plan_targets
from lora_core.budget.moved import moved
from lora_core.budget.setup import METHODS, Setup
from lora_core.budget.wire import (
    SHARDINGS,
    Exchange,
    Moved,
    Traffic,
    gathered_bytes,
    ring_bytes,
    seconds_on_wire,
    wire_bytes,
)

FULL = Moved(
    plain_bytes=1000,
    trained_bytes=1000,
    first_bytes=1000,
    again_bytes=1000,
    block_bytes=800,
    persistent_bytes=0,
    shared_numbers=500,
)
"""500 weights of 2 bytes, all trained."""
LORA = Moved(
    plain_bytes=40,
    trained_bytes=20,
    first_bytes=1000,
    again_bytes=900,
    block_bytes=800,
    persistent_bytes=20,
    shared_numbers=500,
)
"""500 frozen weights and 10 trained ones, which stay whole; a table of 50 weights is not read in the backward pass."""


def exchange(sharding: str, processes: int = 4, **changes: object) -> Exchange:
    return Exchange(sharding, processes, **{"reuse_weights": 0, **changes})  # type: ignore[arg-type]


# --- by hand ---


def test_a_ring_passes_all_parts_but_one() -> None:
    """Of 1000 bytes, each of 4 ranks sends 3 quarters to gather or to scatter, and twice that to reduce everywhere."""
    assert (
        ring_bytes({"all_gather_into_tensor": 1000}, 4)
        == ring_bytes({"reduce_scatter_tensor": 1000}, 4)
        == 750
    )
    assert ring_bytes({"all_reduce": 1000, "all_gather": 1000}, 4) == 1500 + 750


@pytest.mark.parametrize(
    ("sharding", "changes", "expected"),
    [
        ("ddp", {}, Traffic(1500, 0, 0)),
        ("ddp", {"gradient_accumulation_steps": 4}, Traffic(1500, 0, 0)),
        ("zero1", {"reduces_to_owner": True}, Traffic(750, 750, 0)),
        ("zero2", {"reduces_to_owner": True}, Traffic(750, 750, 0)),
        ("zero1", {"gradient_accumulation_steps": 4}, Traffic(1500, 750, 0)),
        ("zero2", {"gradient_accumulation_steps": 4}, Traffic(4 * 1500, 750, 0)),
        ("zero3", {}, Traffic(750, 0, 2 * 750)),
        ("zero3", {"gradient_accumulation_steps": 4}, Traffic(4 * 750, 0, 4 * 2 * 750)),
        ("zero3", {"checkpointing": True}, Traffic(750, 0, 2 * 750 + 600)),
        ("zero3_offload", {}, Traffic(750, 0, 2 * 750, host_bytes=2 * 250)),
    ],
)
def test_full_fine_tuning(sharding: str, changes: dict[str, object], expected: Traffic) -> None:
    """In the units of arXiv 1910.02054, section 7: 2 P for DDP and the paper's ZeRO-1 and 2, and 3 P for ZeRO-3."""
    assert wire_bytes(FULL, exchange(sharding, **changes)) == expected


@pytest.mark.parametrize(
    ("sharding", "changes", "expected"),
    [
        ("ddp", {}, Traffic(60, 0, 0)),  # adapters are float32 without an engine: 2 · 3/4 · 40
        ("zero2", {"gradient_accumulation_steps": 2}, Traffic(60, 15, 0)),
        ("zero3", {"gradient_accumulation_steps": 2}, Traffic(30, 15, 2 * 1425)),
        ("zero3", {"checkpointing": True}, Traffic(15, 15, 1425 + 600)),
    ],
)
def test_an_adapter(sharding: str, changes: dict[str, object], expected: Traffic) -> None:
    """What ZeRO-3 gathers of the frozen base is nearly all of it."""
    assert wire_bytes(LORA, exchange(sharding, **changes)) == expected


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_one_rank_sends_nothing(sharding: str) -> None:
    assert wire_bytes(FULL, exchange(sharding, processes=1)).wire_bytes == 0


def test_what_is_needed_again_soon_stays_gathered() -> None:
    """Half of 500 numbers comes back within 500; all of them within 1000, and a third of that where blocks are computed twice."""
    assert gathered_bytes(FULL, exchange("zero3", reuse_weights=500)) == 1000 + 500
    assert gathered_bytes(FULL, exchange("zero3", reuse_weights=1000)) == 1000
    assert (
        gathered_bytes(FULL, exchange("zero3", reuse_weights=750, checkpointing=True))
        == 1000 + 500 + 800
    )


def test_seconds_are_those_of_the_bits() -> None:
    assert seconds_on_wire(12_500_000_000, gbit=100) == 1


# --- the model's weights ---


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    """94,528 weights, the head tied to a table of 20,480."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def of(model: LlamaForCausalLM, method: str, persistent: int = 0) -> Moved:
    setup = Setup(method, tokens=60, compute_bytes=4)  # type: ignore[arg-type]
    return moved(
        model,
        setup,
        plan_targets(model, LoraConfig(r=4, lora_alpha=8)),
        persistent_weights=persistent,
    )


def test_codes_move_as_codes(tiny: LlamaForCausalLM) -> None:
    """Two blocks of 36,864 weights in linear layers: a float32 each, or half a byte."""
    assert of(tiny, "lora").first_bytes - of(tiny, "qlora").first_bytes == 2 * 36_864 * (4 - 0.5)


def test_an_adapter_moves_in_the_dtype_in_which_it_is_held(tiny: LlamaForCausalLM) -> None:
    setup = Setup("lora", tokens=60, compute_bytes=2)
    found = moved(tiny, setup, plan_targets(tiny, LoraConfig(r=4, lora_alpha=8)))
    assert (found.plain_bytes, found.trained_bytes) == (4 * 8192, 2 * 8192)


def test_lengths_of_rows_are_trained_too(tiny: LlamaForCausalLM) -> None:
    targets = plan_targets(tiny, LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",)))
    plain, dora = (
        moved(tiny, Setup("lora", tokens=60, dora=dora), targets) for dora in (False, True)
    )
    assert dora.plain_bytes - plain.plain_bytes == 4 * 2 * 64


def test_a_frozen_table_of_its_own_is_read_once(tiny: LlamaForCausalLM) -> None:
    untied = LlamaConfig(**{**tiny.config.to_dict(), "tie_word_embeddings": False})
    with torch.device("meta"):
        model = LlamaForCausalLM(untied)
    lora, full = of(model, "lora"), of(model, "full")
    assert lora.first_bytes - lora.again_bytes == 4 * 20_480
    assert full.first_bytes == full.again_bytes


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_let_go_of_or_stays(tiny: LlamaForCausalLM, method: str) -> None:
    every, some = of(tiny, method), of(tiny, method, persistent=1000)
    assert every.first_bytes == some.first_bytes + some.persistent_bytes
    assert every.persistent_bytes == 0 < some.persistent_bytes


# --- beside what was counted ---

TWO = Exchange("zero3", processes=2, gradient_accumulation_steps=2, reuse_weights=0)
FAR = replace(TWO, reuse_weights=1_000_000_000)
COUNTED = [
    ("lora", replace(TWO, sharding="ddp"), 0, {"all_reduce": 32_768}, 0),
    ("lora", replace(TWO, sharding="zero1"), 0, {"all_reduce": 32_768, "all_gather": 32_768}, 0),
    ("lora", replace(TWO, sharding="zero2"), 0, {"all_reduce": 65_536, "all_gather": 32_768}, 0),
    ("full", TWO, 0, {"reduce_scatter": 756_224, "all_gather": 1_840_128}, 0),
    ("lora", TWO, 0, {"reduce_scatter": 65_536, "all_gather": 1_806_848}, 0.001),
    ("qlora", TWO, 0, {"reduce_scatter": 65_536, "all_gather": 774_656}, 0.001),
    ("lora", TWO, 1000, {"reduce_scatter": 65_536, "all_gather": 1_705_216}, 0),
    (
        "lora",
        replace(TWO, checkpointing=True),
        0,
        {"reduce_scatter": 65_536, "all_gather": 2_485_248},
        0.02,
    ),
    (
        "lora",
        replace(TWO, checkpointing=True),
        1000,
        {"reduce_scatter": 65_536, "all_gather": 2_327_808},
        0.02,
    ),
    ("lora", FAR, 0, {"reduce_scatter": 65_536, "all_gather": 821_760}, 0),
    (
        "lora",
        replace(FAR, checkpointing=True),
        0,
        {"reduce_scatter": 65_536, "all_gather": 1_282_560},
        0.16,
    ),
]
"""Bytes of the whole tensors that rank 0 of two gave to each collective in the sixth step of two parts, single numbers aside:
DeepSpeed 0.19.8, accelerate 1.15.0, torch 2.13, float32 over gloo, this model with adapters of rank 4; infra/deepspeed's configs but for
stage3_max_reuse_distance and stage3_param_persistence_threshold (third column). The last column is the tolerance, as a share: a
norm that no gradient passes is not read again; with checkpointing, the engine gathers a matrix here and there once more, or,
where blocks stay near, lets go of fewer of them than all."""


@pytest.mark.parametrize(("method", "how", "persistent", "whole", "share"), COUNTED)
def test_what_was_counted_is_foreseen(
    tiny: LlamaForCausalLM,
    method: str,
    how: Exchange,
    persistent: int,
    whole: dict[str, int],
    share: float,
) -> None:
    foreseen = wire_bytes(of(tiny, method, persistent), how).wire_bytes
    assert foreseen == pytest.approx(ring_bytes(whole, how.processes), rel=share)
