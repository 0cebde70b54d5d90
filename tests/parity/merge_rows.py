"""How much of a real adapter's update a merge keeps, by storage; means over the layers."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import fmean

from parity.rows import Row, at_least, figure, has_rank

from lora_core import merge_fidelity
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model

GOALS = {"float32": 0.999, "bfloat16": 0.95}
"""Minimum fraction that a merge into the original weight keeps; NF4's loss is only reported."""


def merge_rows(summary: Row) -> Iterator[Row]:
    """Yield the kept fraction and the error of the highest-rank adapter's update, by storage."""
    label = max(
        (label for label, model in summary["models"].items() if has_rank(model)),
        key=lambda one: summary["models"][one]["training"]["rank"],
    )
    base, folder = (
        Path(summary["base"]["folder"]),
        Path(summary["models"][label]["training"]["folder"]) / "adapter",
    )
    quantized, original = (
        load_model(base, quantization, detect()) for quantization in ("nf4", "none")
    )
    found = sorted(
        merge_fidelity(quantized, folder, original=original),
        key=lambda one: (one.base, one.storage),
    )
    for (kind, storage), layers in groupby(found, key=lambda one: (one.base, one.storage)):
        kept = [layer.retention for layer in layers]
        what = f"{label} merged into the {kind} base, stored in {storage}"
        name = f"{what}: fraction of the update kept"
        fraction = fmean(one.fraction for one in kept)
        goal = GOALS.get(storage)
        yield figure(name, fraction) if goal is None else at_least(name, fraction, goal)
        yield figure(
            f"{what}: relative error of the update", fmean(one.relative_error for one in kept)
        )
