"""Full fine-tuning in 16 bits: AdamW on the 16-bit weights, and on float32 master weights.

    PYTHONPATH=tests python -m families.precision [--steps 60]

It computes in bfloat16 or float16 as on a GPU, but on the CPU: only the device differs. For each
learning rate it prints the loss of the first and the last step and how many weights changed, and
writes build/precision.json. Returns 1 if a goal is missed.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from parity.rows import Row, figure, near, show_grid
from tiny import save_tiny_model

from lora_core.files import write_json
from pipelines.models.hardware import FUSED, Hardware, Optimizer
from pipelines.models.loading import load_model
from pipelines.models.packs import Pack, pack
from pipelines.training.objective import Objective
from pipelines.training.optimizers import build

RESULT = Path(__file__).resolve().parents[2] / "build" / "precision.json"
RATES = (1e-5, 3e-5, 1e-4)
DTYPES = (torch.bfloat16, torch.float16)
CLOSE = 0.02
"""How far the fraction of weights that change may be from float32's."""


@dataclass(frozen=True)
class TrainingOutcome:
    """One training."""

    first: float
    """Loss of the first step, nats per token."""
    last: float
    moved: float
    """Fraction of the weights of matrices that changed."""
    norms_moved: float
    """Fraction of the weights of norms that changed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of each training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        base = save_tiny_model(Path(folder) / "model")
        rows = [row for rate in RATES for row in rows_of(base, rate, options.steps)]
    write_json(RESULT, rows)
    show_grid(f"Full fine-tuning, {options.steps} steps", rows)
    return 1 if any(row["holds"] is False for row in rows) else 0


def rows_of(base: Path, rate: float, steps: int) -> Iterator[Row]:
    """Yield the results of one learning rate."""
    exact = trained(base, rate, torch.float32, masters=True, steps=steps)
    yield from described(f"lr {rate:g}, float32", exact)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        yield from described(
            f"lr {rate:g}, {name}, on 16-bit weights",
            trained(base, rate, dtype, masters=False, steps=steps),
        )
        found = trained(base, rate, dtype, masters=True, steps=steps)
        what = f"lr {rate:g}, {name}, on float32 masters"
        yield near(f"{what}: weights changed", found.moved, exact.moved, CLOSE)
        yield near(f"{what}: norms changed", found.norms_moved, exact.norms_moved, CLOSE)
        yield near(
            f"{what}: loss falls by", found.first - found.last, exact.first - exact.last, 0.1
        )


def described(what: str, one: TrainingOutcome) -> Iterator[Row]:
    yield figure(f"{what}: weights changed", one.moved)
    yield figure(f"{what}: norms changed", one.norms_moved)
    yield figure(f"{what}: loss falls by", one.first - one.last)


def trained(
    base: Path, rate: float, dtype: torch.dtype, *, masters: bool, steps: int
) -> TrainingOutcome:
    """Train all weights; without master weights, AdamW gets the weights as they were loaded."""
    model = load_model(base, "none", Hardware("cpu", torch.float32, "gloo")).train()
    if not masters:
        model.to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    objective = Objective(model)
    groups = [{"params": list(model.parameters()), "lr": rate, "weight_decay": 0.0}]
    # has_masters=True disables the refusal of 16-bit weights.
    optimizer = build(Optimizer(FUSED, ""), groups, has_masters=not masters)
    scaler = torch.amp.GradScaler("cpu", enabled=masters and dtype is torch.float16)
    losses = []
    for step in range(steps):
        batch, count = drawn(step % 3)
        with torch.autocast("cpu", dtype=dtype, enabled=masters and dtype is not torch.float32):
            loss = objective(batch) / count
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    moved = {
        name: (parameter != before[name]).float() for name, parameter in model.named_parameters()
    }
    return TrainingOutcome(
        losses[0], losses[-1], fraction(moved, norms=False), fraction(moved, norms=True)
    )


def fraction(moved: dict[str, torch.Tensor], *, norms: bool) -> float:
    """Return the fraction of weights that changed, without the embedding."""
    chosen = [
        one.flatten()
        for name, one in moved.items()
        if ("norm" in name) is norms and "embed" not in name
    ]
    return float(torch.cat(chosen).mean())


def drawn(seed: int) -> tuple[Pack, int]:
    """Return four examples and the number of their supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    examples = [
        {
            "input_ids": torch.randint(0, 300, (24,), generator=generator).tolist(),
            "supervised": [False] * 4 + [True] * 20,
        }
        for _ in range(4)
    ]
    return pack(examples, "cpu"), 80


if __name__ == "__main__":
    sys.exit(main())
