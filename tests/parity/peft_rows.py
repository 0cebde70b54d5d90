"""The adapters of a run in PEFT and here: the same files on the same base give the same logits.

Both load each adapter on the base in full precision and in NF4, and compute the logits of the same
held-out examples. Each difference is reported with the effect of the adapter itself on the logits:
an adapter that was not loaded at all would differ by as much.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import load_from_disk
from parity.rows import Row, at_least, at_most, has_rank
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_core import load_adapter
from lora_core.base.quant import disable_cpu_repacking
from lora_core.training.attention import Segment
from pipelines.models.forward import PackReader
from pipelines.models.hardware import Hardware
from pipelines.models.loading import load_model
from pipelines.models.packs import Pack

EXAMPLES = 8
FLOAT32 = Hardware("cpu", torch.float32, "gloo")
"""The hardware that both sides use, even if there is a GPU."""
TOLERANCE = 1e-3
"""Logits after 30 layers of float32 sums in another order differ by about 1e-4."""


def peft_rows(summary: Row) -> Iterator[Row]:
    """Yield the results of each adapter on the base in full precision and in NF4."""
    for quantization in ("none", "nf4"):
        yield from compare(summary, quantization)


def compare(summary: Row, quantization: str) -> Iterator[Row]:
    """Yield the results of each adapter on the base with one quantization."""
    base = Path(summary["base"]["folder"])
    sequences = held_out(summary)
    plain = peft_logits(base, None, quantization, sequences)
    for label, model in summary["models"].items():
        if not has_rank(model):
            continue
        adapter = Path(model["training"]["folder"]) / "adapter"
        theirs = peft_logits(base, adapter, quantization, sequences)
        ours = our_logits(base, adapter, quantization, sequences)
        effect = largest(theirs, plain)
        difference = largest(ours, theirs)
        where = f"{label} over {'NF4' if quantization == 'nf4' else 'float32'}"
        yield at_least(f"{where}: PEFT's logits less the base's", effect, 1.0)
        yield at_most(f"{where}: our logits less PEFT's", difference, TOLERANCE)


def held_out(summary: Row) -> list[Tensor]:
    """Return the tokens of the first held-out examples."""
    folder = next(
        Path(entry["folder"]) for entry in summary["stages"] if entry["name"].startswith("data ")
    )
    rows = load_from_disk(str(folder / "validation"))
    return [torch.tensor(rows[index]["input_ids"]) for index in range(min(EXAMPLES, len(rows)))]


@torch.inference_mode()
def peft_logits(
    base: Path, adapter: Path | None, quantization: str, sequences: list[Tensor]
) -> list[Tensor]:
    """Return the logits of the base, loaded with transformers, and PEFT's adapter if given."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config if quantization == "nf4" else None
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    # In evaluation, bitsandbytes would round the codes' scales again on some processors.
    disable_cpu_repacking(model)
    model.eval()
    return [model(input_ids=tokens[None]).logits[0] for tokens in sequences]


@torch.inference_mode()
def our_logits(
    base: Path, adapter: Path | None, quantization: str, sequences: list[Tensor]
) -> list[Tensor]:
    """Return the logits of our code: packed attention, our layers, a separate head."""
    model = load_model(base, quantization, FLOAT32)
    if adapter is not None:
        load_adapter(model, adapter)
    reader = PackReader.default(model)
    return [reader.logits(every_position(tokens)) for tokens in sequences]


def every_position(tokens: Tensor) -> Pack:
    """Return a sequence as a pack in which each position predicts; the targets are not used."""
    positions = torch.arange(len(tokens))
    return Pack(tokens, positions, [Segment(len(tokens))], positions, tokens)


def largest(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference of any logit."""
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))
