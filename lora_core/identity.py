"""Which base is this? A digest of a model's weights that is cheap, and the same wherever the model is loaded.

From every weight matrix a fixed, evenly spread sample of values is taken, so that the cost grows with the number of
tensors and not with their size. A dense sample is rounded to bfloat16 first: float32 and bfloat16 copies of one
checkpoint agree. A 4-bit base is sampled in its packed codes, which differ from the dense values by design; hence
one digest for each kind of storage, and a comparison only within a kind.
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_core.injection import plain_name, unwrapped
from lora_core.layers import LoraLinear
from lora_core.quant import Kind, is_nf4

SAMPLES_PER_TENSOR = 256


def fingerprint(model: nn.Module) -> tuple[Kind, str]:
    """Return how the model's linear layers are stored and the digest of its frozen weights.

    An injected adapter does not count: the model under it is what is identified.
    """
    model = unwrapped(model)
    tensors = dict(_base_tensors(model))
    kind: Kind = "nf4" if any(is_nf4(module) for module in model.modules()) else "dense"
    return kind, digest_of(tensors)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and sampled values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tuple(tensor.shape)}:".encode())
        total.update(_sample(tensor))
    return total.hexdigest()


def _base_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Yield the base's own parameters under the names they have without an adapter; tied ones once."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    adapters = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    wrapped = {f"{name}.base" for name in layers}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            owner, _, last = name.rpartition(".")
            plain = f"{owner.removesuffix('.base')}.{last}" if owner in wrapped else name
            yield plain_name(plain), parameter.detach()


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    values = flat[places].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16).view(torch.int16)
    return bytes(values.contiguous().view(torch.uint8).tolist())
