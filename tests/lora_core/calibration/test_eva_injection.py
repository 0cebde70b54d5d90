"""Injection with EVA: A matches a reference and PEFT, and step 0 equals the base."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from lora_core import ConfigError, LoraConfig, TargetError, inject, lora_layers
from lora_core.calibration.eva import eva_initialization

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
Batches = Callable[[nn.Module], list[Callable[[], object]]]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning"
    ),
]


def config(r: int = 4, targets: tuple[str, ...] = NAMES) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=6, target_modules=targets, init_lora_weights="eva")


def recorded_inputs(
    model: nn.Module, batches: list[Callable[[], object]]
) -> dict[str, list[Tensor]]:
    """Return the rows that each layer reads in each batch."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in NAMES}

    def record(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        inputs[name].append(args[0].flatten(0, -2))

    with ExitStack() as hooks:
        for name in NAMES:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(partial(record, name)))
        for run_batch in batches:
            run_batch()
    return inputs


def test_a_spans_the_strongest_directions_of_each_input(
    build_llama: Build, calibration_batches: Batches, logits: Logits
) -> None:
    """The reference decomposes all inputs at once, in float64, and records them independently."""
    model = build_llama()
    before = logits(model)
    batches = calibration_batches(model)
    inputs = recorded_inputs(model, batches)
    inject(model, config(), seed=1, data=batches)
    for name, layer in lora_layers(model):
        rows = torch.cat(inputs[name]).detach().double()
        best = torch.linalg.svdvals(rows)[:4].square().sum()
        kept = (rows @ layer.lora_A.detach().double().T).square().sum() / best
        # The second batch is merged with only the 4 directions kept from the 9 of the first batch.
        assert 0.95 < kept.item() <= 1 + 1e-6, name
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(logits(model), before)


def test_injection_uses_eva_of_the_base(
    build_nf4_llama: Build, calibration_batches: Batches, logits: Logits
) -> None:
    model = build_nf4_llama()
    before = logits(model)
    batches = calibration_batches(model)
    expected = eva_initialization(model, dict.fromkeys(NAMES, 4), batches)
    inject(model, config(), seed=1, data=batches)
    for name, layer in lora_layers(model):
        assert torch.equal(layer.lora_A, expected[name])
    assert torch.equal(logits(model), before)


def test_insufficient_data_raises_and_leaves_model_unchanged(
    build_llama: Build, calibration_batches: Batches, refuses: Callable[..., None]
) -> None:
    model = build_llama()
    one_batch = calibration_batches(model)[:1]
    refuses(
        model,
        lambda: inject(model, config(r=16), seed=0, data=one_batch),
        ConfigError,
        "fewer than its rank",
    )
    refuses(
        model,
        lambda: inject(model, config(), seed=0, data=[]),
        TargetError,
        "received no input",
    )


def test_batches_are_consumed_lazily(build_llama: Build, calibration_batches: Batches) -> None:
    """A generator may create each batch when it is needed, so that only one is in memory."""
    model = build_llama()
    batches = calibration_batches(model)
    created = []

    def stream() -> Iterator[Callable[[], object]]:
        for run_batch in batches:
            created.append(run_batch)
            yield run_batch

    inject(model, config(), seed=1, data=stream())
    assert len(created) == len(batches)


class OddFunction(nn.Module):
    """Two layers that compute an odd function: for pairs x, −x the mean of every input is zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.first = nn.Linear(24, 16, bias=False)
        self.second = nn.Linear(16, 8, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / 4

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_spans_the_same_space_as_in_peft(rank: int) -> None:
    """PEFT subtracts the mean, which is zero here; it uses random projections, ours is exact."""
    generator = torch.Generator().manual_seed(7)
    half = torch.randn(200, 24, generator=generator) * 0.6 ** torch.arange(24)
    x = torch.cat([half, -half])
    settings = PeftLoraConfig(
        r=rank,
        target_modules=["first", "second"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1, tau=0.999),
    )
    theirs = get_peft_model(OddFunction(), settings)
    plain: dict[str, Any] = {
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
        "show_progress_bar": False,
    }
    initialize_lora_eva_weights(theirs, [{"x": x}], **plain)
    ours = OddFunction()
    inject(ours, config(rank, ("first", "second")), seed=0, data=[lambda: ours(x)])
    for name, layer in lora_layers(ours):
        their_layer = theirs.get_submodule(f"base_model.model.{name}")
        their_a = their_layer.lora_A["default"].weight.detach()
        cosines = torch.linalg.svdvals(layer.lora_A.detach() @ F.normalize(their_a).T)
        # Four power iterations with neighboring singular values at a ratio of 0.6 leave 0.6⁹ of
        # the other directions, an angle below 0.02.
        assert cosines.min() > 1 - 2e-4, name
