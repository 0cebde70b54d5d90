"""The optimizer depends on hardware, engine and memory; an 8-bit state resumes to the bit."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.errors import PipelineError
from pipelines.models import hardware
from pipelines.models.hardware import (
    FUSED,
    PAGED,
    REPLACED,
    AttentionShape,
    Hardware,
    attention_kernel,
    choose_optimizer,
    detect,
    detect_for_training,
)
from pipelines.models.loading import attention_heads, load_model
from pipelines.runtime.interfaces.inputs import TrainOptions
from pipelines.training import eight_bit
from pipelines.training.optimizers import build, full_bytes

CPU = Hardware("cpu", torch.float32, "gloo")
GPU = Hardware("cuda:0", torch.bfloat16, "nccl", 24 << 30)
FITS, LARGE = 20 << 30, 23 << 30
"""Of 24 GiB, nine tenths are 21.6."""
LEARNING_RATE = 1e-3


@pytest.mark.parametrize(
    ("hardware", "state", "full_bytes", "name"),
    [
        (CPU, "whole", None, FUSED),
        (CPU, "whole", LARGE, FUSED),
        (CPU, "shared", None, FUSED),
        (GPU, "whole", None, FUSED),
        (GPU, "whole", FITS, FUSED),
        (GPU, "whole", LARGE, PAGED),
        (GPU, "shared", LARGE, FUSED),
        (GPU, "replaced", LARGE, REPLACED),
    ],
)
def test_the_optimizer_depends_on_hardware_and_engine(
    hardware: Hardware, state: Any, full_bytes: int | None, name: str
) -> None:
    assert choose_optimizer(hardware, state, full_bytes).name == name


def test_the_description_has_the_reason_for_the_optimizer() -> None:
    text = GPU.describe("flash", choose_optimizer(GPU, "whole", LARGE))
    assert text.startswith(
        "device cuda:0, bfloat16, nccl, flash attention, "
        "paged 8-bit AdamW (full fine-tuning needs about 23.0 of 24.0 GiB)"
    )


def test_the_kernel_is_the_one_that_pytorch_uses(tiny_folder: Path) -> None:
    """Shared heads of keys and values do not change it."""
    model = load_model(tiny_folder, "none", CPU)
    assert attention_heads(model) == (4, 2, 16)
    assert attention_kernel(detect(), attention_heads(model)) == "flash"
    assert attention_kernel(CPU, AttentionShape(4, 4, 16)) == "flash"
    assert attention_kernel(CPU, None) == "no"


def test_full_fine_tuning_needs_more_for_more_tokens_and_for_copies_of_gradients(
    tiny_folder: Path,
) -> None:
    model = load_model(tiny_folder, "none", CPU)
    options = TrainOptions(processes=1, device="gpu", timeout_seconds=600)
    needs = full_bytes(model, options, 64, torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert needs > 4 * 4 * weights  # masters, gradients and two means, in 4 bytes
    assert full_bytes(model, options, 6400, torch.bfloat16) > needs
    assert full_bytes(model, options, 64, torch.float32) != needs  # no copies, larger activations
    # a second copy of the gradients of float32 masters
    two_processes = options.model_copy(update={"processes": 2})
    assert full_bytes(model, two_processes, 64, torch.bfloat16) == needs + 4 * weights


@dataclass
class Taught:
    """Two matrices, one too small for 8 bits, and the optimizer that trains them."""

    weights: list[nn.Parameter]
    optimizer: Any

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        for weight in self.weights:
            weight.grad = torch.randn_like(weight)
        self.optimizer.step()

    def means(self) -> list[dict[str, eight_bit.Parts]]:
        return [
            {
                key: eight_bit.mean_parts(self.optimizer.state[weight], key)
                for key in eight_bit.NUMBERS
            }
            for weight in self.weights
        ]


def taught(name: str, steps: int = 3) -> Taught:
    torch.manual_seed(0)
    device = detect().device
    weights = [nn.Parameter(torch.randn(*shape, device=device)) for shape in ((80, 70), (8, 8))]
    groups = [{"params": weights, "lr": LEARNING_RATE, "weight_decay": 0.0}]
    found = Taught(weights, build(replace(choose_optimizer(CPU, "whole", None), name=name), groups))
    for seed in range(steps):
        found.step(seed)
    return found


pages = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pages
def test_an_8_bit_state_resumes_to_the_bit() -> None:
    uninterrupted = taught(PAGED)
    resumed = taught(PAGED, steps=0)
    assert [sorted(mean["exp_avg"]) for mean in uninterrupted.means()] == [["", "/absmax"], [""]]
    for own, weight, mean in zip(
        resumed.weights, uninterrupted.weights, uninterrupted.means(), strict=True
    ):
        own.data.copy_(weight.data)
        eight_bit.restore(
            resumed.optimizer,
            own,
            {
                key: {e: t.to("cpu", copy=True) for e, t in parts.items()}
                for key, parts in mean.items()
            },
            3,
        )
    for seed in (3, 4):
        uninterrupted.step(seed)
        resumed.step(seed)
    assert all(
        torch.equal(one, other)
        for one, other in zip(uninterrupted.weights, resumed.weights, strict=True)
    )


@pages
def test_a_run_resumes_with_the_other_optimizer() -> None:
    """8 bits differ from float32 by rounding: at most 1/127 of the largest value of a block."""
    plain = taught(FUSED)
    rounded = taught(PAGED)
    for one, other in zip(plain.means(), rounded.means(), strict=True):
        for key, mean in one.items():
            largest = float(mean[""].abs().max())
            assert torch.allclose(
                eight_bit.dequantize(other[key], key), mean[""], atol=0.03 * largest
            ), key
    taken = taught(PAGED, steps=0)
    for own, mean in zip(taken.weights, plain.means(), strict=True):
        eight_bit.restore(taken.optimizer, own, mean, 3)
    for one, other in zip(plain.means(), taken.means(), strict=True):
        for key, mean in one.items():
            largest = float(mean[""].abs().max())
            assert torch.allclose(
                eight_bit.dequantize(other[key], key), mean[""], atol=0.02 * largest
            ), key


def test_the_dtype_of_a_training_is_that_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect_for_training("auto") == detect()
    for dtype in ("float32", "bfloat16"):
        assert detect_for_training(dtype) == replace(detect(), dtype=getattr(torch, dtype))
    old_gpu = Hardware("cuda:0", torch.float16, "nccl", 1 << 30)
    monkeypatch.setattr(hardware, "detect", lambda: old_gpu)
    monkeypatch.setattr(Hardware, "name", "an old GPU")
    assert detect_for_training("auto") is old_gpu
    assert detect_for_training("float32").dtype is torch.float32
    with pytest.raises(PipelineError, match="an old GPU has no units for it; remove the key"):
        detect_for_training("bfloat16")
