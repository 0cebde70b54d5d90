"""Keys of PEFT's files under the names of an unwrapped model with an unnamed adapter."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_core.errors import AdapterError

WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of a path that torch.compile, FSDP and activation checkpointing add."""
NAMED = re.compile(
    r"(\.lora_[AB]|\.lora_embedding_[AB]|\.lora_magnitude_vector|\.modules_to_save"
    r"|\.trainable_tokens_delta)\.default(?=\.|$)"
)
"""The name that PEFT gives to an adapter if none is chosen, after the tensor's kind."""
COPY = ".modules_to_save."
"""Precedes the tensors of the trained copy of a module."""
ORIGINAL = ".original_module."
"""Precedes the tensors of the module that was copied."""


def plain_keys(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors under the keys of an unwrapped model with an unnamed adapter.

    Removed are the adapter's name, `default`, and the parts of paths that torch.compile, FSDP and
    activation checkpointing add. Of a module that PEFT saved in full, the trained copy is kept.

    Raises:
        AdapterError: two tensors have one key and differ.
    """
    found: dict[str, Tensor] = {}
    copied = {key.partition(COPY)[0] for key in tensors if COPY in key}
    for key, tensor in tensors.items():
        if key.partition(ORIGINAL)[0] in copied and ORIGINAL in key:
            continue
        plain = NAMED.sub(r"\1", WRAPPERS.sub("", key)).replace(COPY, ".")
        if plain in found and not torch.equal(found[plain], tensor):
            raise AdapterError(
                f"{where} has two different tensors for {plain}; save the adapter again"
            )
        found[plain] = tensor
    return found
