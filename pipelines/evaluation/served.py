"""Whether an adapter answers when it is served as it did when it was scored.

An export is scored again on held-out examples by another library, PEFT, through transformers: the
adapter's own folder, and its export for vLLM, which PEFT reads as well. Rounding alone makes two
computations differ. The noise floor is how much this pipeline's own scores differ between packs and
the model's own forward on the same examples.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_core.errors import LoraError
from lora_core.export.export import VLLM_RANKS, export_vllm
from lora_core.modules import module_at
from pipelines.comparison.record_types import TaskRecord
from pipelines.errors import one_line
from pipelines.models.forward import PackReader
from pipelines.models.packs import pack
from pipelines.models.tolerances import tolerance_of
from pipelines.runtime.interfaces.results import ServedCheck, ServedFormat
from pipelines.runtime.memory import is_out_of_memory

HEAD_ROWS = 128
"""Positions whose logits exist at once."""
NAME = "served"
"""Of the adapter in PEFT."""
MAX_REASON = 200


@torch.inference_mode()
def own_losses(model: PreTrainedModel, examples: Sequence[dict[str, Any]]) -> list[float]:
    """Return each example's negative log-likelihood in nats, read alone by the own forward.

    Args:
        model: in evaluation mode.
        examples: rows of the prepared data.
    """
    reader = PackReader(model, packed=False, head=None)
    losses = []
    for example in examples:
        likelihoods, _ = reader.log_likelihoods(pack([example], str(model.device)), HEAD_ROWS)
        losses.append(-float(likelihoods.sum()))
    return losses


def check_served(
    model: PreTrainedModel,
    adapter: Path,
    examples: Sequence[dict[str, Any]],
    records: Sequence[TaskRecord],
    own: Sequence[float],
) -> ServedCheck:
    """Score an adapter's exports with PEFT, and compare them with its records.

    Args:
        model: the base, without the adapter; unchanged afterwards.
        adapter: its folder.
        examples: rows of the prepared data, at least one.
        records: of the same examples, as they were scored.
        own: losses of the same examples with the adapter, by the own forward.
    """
    formats = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("peft", "vllm"):
            exported = None if name == "peft" else Path(scratch) / name
            export = partial(_export, adapter, exported)
            formats.append(_scored_format(model, name, export, examples, records))
    return ServedCheck(
        library=f"PEFT {_peft_version()}",
        examples=len(records),
        noise_floor=_largest_difference(own, records),
        tolerance=tolerance_of(model.dtype).loss,
        formats=tuple(formats),
    )


def _scored_format(
    model: PreTrainedModel,
    name: str,
    export: Callable[[], Path],
    examples: Sequence[dict[str, Any]],
    records: Sequence[TaskRecord],
) -> ServedFormat:
    """Score one format; a failure is a result."""
    try:
        with _adapted_by_peft(model, export()):
            losses = own_losses(model, examples)
    except LoraError as error:
        return ServedFormat(name=name, reason=one_line(error, with_type=False, limit=MAX_REASON))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # PEFT may raise any error for a family or feature that it does not support
        return ServedFormat(name=name, reason=one_line(error, limit=MAX_REASON))
    return ServedFormat(name=name, difference=_largest_difference(losses, records))


def _export(adapter: Path, folder: Path | None) -> Path:
    """Export an adapter for vLLM into a folder, or return its own folder."""
    if folder is None:
        return adapter
    export_vllm(adapter, folder, max_rank=VLLM_RANKS[-1])
    return folder


@contextmanager
def _adapted_by_peft(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Let PEFT put an adapter into a model inside a block; restore every module after it."""
    modules = dict(model.named_modules())
    try:
        model.load_adapter(str(folder), adapter_name=NAME)
        model.eval()
        yield
    finally:
        for name, module in modules.items():
            if name and module_at(model, name) is not module:
                parent, _, child = name.rpartition(".")
                setattr(module_at(model, parent), child, module)
        model._hf_peft_config_loaded = False
        vars(model).pop("peft_config", None)


def _largest_difference(losses: Sequence[float], records: Sequence[TaskRecord]) -> float:
    """Return the largest difference of an example, in nats per token."""
    differences = []
    for loss, record in zip(losses, records, strict=True):
        differences.append(abs(loss - record.nll) / max(1, record.tokens))
    return max(differences)


def _peft_version() -> str:
    try:
        return version("peft")
    except PackageNotFoundError:
        return "(not installed)"
