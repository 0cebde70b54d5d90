"""A rank-truncated adapter compared with adapters trained at those ranks: energy and loss."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import load_from_disk
from parity.rows import Row, figure, has_rank

from lora_core import load_adapter
from lora_core.merging.dequantize import dequantize
from lora_core.spectrum.truncation import truncate_adapter, truncation_table
from pipelines.evaluation.scoring import score_examples
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model


def rank_rows(summary: Row) -> Iterator[Row]:
    """Yield the retained energy and held-out loss for each power of 2 below the highest rank."""
    trained = {
        model["training"]["rank"]: (label, model)
        for label, model in summary["models"].items()
        if has_rank(model)
    }
    highest = max(trained)
    label, model = trained[highest]
    folder = Path(model["training"]["folder"]) / "adapter"
    ranks = [rank for rank in (2**n for n in range(12)) if rank < highest]
    for kept in truncation_table(folder, ranks):
        what = f"{label} truncated to rank {kept.rank}"
        yield figure(f"{what}: energy of the update kept", kept.energy)
        with TemporaryDirectory() as scratch:
            truncate_adapter(folder, Path(scratch) / "truncated", kept.rank)
            loss = held_out_loss(summary, Path(scratch) / "truncated")
        yield figure(f"{what}: task loss", loss, "nats")
    for rank, (name, one) in sorted(trained.items()):
        yield figure(
            f"{name}, trained at rank {rank}: task loss", one["scores"]["task_loss"], "nats"
        )


def held_out_loss(summary: Row, adapter: Path) -> float:
    """Return the loss in nats per supervised token of the held-out examples, on the base in NF4."""
    data = next(
        Path(entry["folder"]) for entry in summary["stages"] if entry["name"].startswith("data ")
    )
    hardware = detect()
    model = load_model(
        Path(summary["base"]["folder"]), summary["recipe"]["base_model"]["quantization"], hardware
    )
    load_adapter(model, adapter)
    dequantize(model, hardware.dtype)
    scored = list(
        score_examples(CheckedReader(model), list(load_from_disk(str(data / "validation"))))
    )
    return sum(one.nll for one in scored) / sum(one.tokens for one in scored)
