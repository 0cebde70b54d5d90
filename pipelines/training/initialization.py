"""Put the adapter into the model that a run trains, with the same initialization on every rank.

eva      from the first examples of the run, one at a time, whatever the number of ranks
loftq    from the base's own files, one weight at a time: no second model is in memory
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedModel

from lora_core import LoraConfig, inject, lora_layers
from lora_core.base.weight_files import mapped_tensors, open_checkpoint
from pipelines.errors import BaseModelError
from pipelines.models.forward import read_through
from pipelines.models.packs import pack

EVA_TOKENS = 2048
"""Enough for the ranks in use and a small fraction of a run; the time for it grows linearly."""


def inject_initialized(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    seed: int,
    examples: Iterable[dict[str, Any]],
    base: Path,
) -> None:
    """Inject an adapter and initialize it. Every rank calls it and receives rank 0's tensors.

    Args:
        model: as it was loaded.
        config: the adapter.
        seed: of the random initialization.
        examples: of all steps and ranks, in the order of the run; eva reads the first of them.
        base: folder of the unquantized base; loftq reads it.
    """
    if config.init_lora_weights == "eva":
        inject(model, config, seed=seed, data=calibration_batches(model, examples))
    elif config.init_lora_weights == "loftq":
        with full_precision_weights(base) as original:
            inject(model, config, seed=seed, original=original)
    else:
        inject(model, config, seed=seed)
    # Engines broadcast parameters, but not the buffers of an initialization from the weight.
    for _, layer in lora_layers(model):
        parameters = layer.parameters(recurse=False)  # type: ignore[attr-defined]
        buffers = layer.buffers(recurse=False)  # type: ignore[attr-defined]
        for tensor in (*parameters, *buffers):
            broadcast(tensor.data)


def calibration_batches(
    model: PreTrainedModel, examples: Iterable[dict[str, Any]]
) -> Iterator[Callable[[], object]]:
    """Yield a call that runs the model on each example, until `EVA_TOKENS` were read.

    Args:
        model: with the adapter, on its device.
        examples: rows of the prepared data; only the first are read.
    """
    read = 0
    for example in examples:
        if read >= EVA_TOKENS:
            return
        read += len(example["input_ids"])
        batch = pack([example], str(model.device))
        yield partial(read_through, model, batch)


@contextmanager
def full_precision_weights(base: Path) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function that reads a linear layer's weight by its path from the files in `base`.

    Raises:
        BaseModelError: the files have no weight of that name.
    """
    checkpoint = open_checkpoint(base)
    with mapped_tensors(base, checkpoint.entries) as tensors:

        def weight(name: str) -> Tensor:
            if f"{name}.weight" not in tensors:
                raise BaseModelError(
                    f"{base} has no {name}.weight, which lora.init 'loftq' needs; save the base "
                    "again with save_pretrained, or use another init"
                )
            return tensors[f"{name}.weight"]

        yield weight
