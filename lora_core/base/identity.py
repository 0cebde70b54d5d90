"""Identify a base: a cheap digest of a model's weights that is the same wherever it is loaded.

Each weight matrix contributes a fixed, evenly spaced sample of values, so the cost grows with the
number of tensors and not with their size. A dense sample is rounded to bfloat16 first, so that
float32 and bfloat16 copies of one checkpoint agree. A 4-bit base is sampled in its packed codes,
which differ from the dense values by design; therefore each kind of storage has its own digest, and
only digests of one kind are compared.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.base.quant import Kind, kind_of
from lora_core.base.weight_files import mapped_tensors, open_checkpoint
from lora_core.errors import CheckpointError
from lora_core.modules import plain_parameters

SAMPLES_PER_TENSOR = 256


def fingerprint(model: nn.Module) -> tuple[Kind, str]:
    """Return how the model's linear layers are stored and the digest of its frozen weights.

    An injected adapter is ignored: the base model is identified.

    Raises:
        CheckpointError: a weight is on the meta device.
    """
    tensors = {name: parameter.detach() for name, parameter in plain_parameters(model).items()}
    offloaded = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if offloaded is not None:
        raise CheckpointError(
            f"{offloaded} is on the meta device, so the model has no fingerprint: it is offloaded "
            "or was built without weights; load it without offloading, "
            "or pass check_base=False where an adapter is loaded"
        )
    return kind_of(model), digest_of(tensors)


def fingerprint_of_folder(folder: Path) -> tuple[Kind, str]:
    """Return the `fingerprint` of the dense model saved in `folder`, reading only the samples.

    A tied output head counts once, even if its file stores it twice.

    Raises:
        CheckpointError: the folder has no complete checkpoint.
    """
    checkpoint = open_checkpoint(folder)
    entries = {
        name: entry
        for name, entry in checkpoint.entries.items()
        if not checkpoint.is_tied_copy(name)
    }
    with mapped_tensors(folder, entries) as tensors:
        return "dense", digest_of(tensors)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and sampled values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tuple(tensor.shape)}:".encode())
        total.update(_sample(tensor))
    return total.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    indices = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    values = flat[indices].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16).view(torch.int16)
    return bytes(values.contiguous().view(torch.uint8).tolist())
