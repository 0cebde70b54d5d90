"""The keys that adapters have in files of old PEFT versions, wrapped models and other tools.

| found                                                  | written by                             |
|--------------------------------------------------------|----------------------------------------|
| `_orig_mod.`, `_fsdp_wrapped_module.`, …               | torch.compile, FSDP, checkpointing     |
| `module.` before the prefix or the model               | data parallelism                       |
| no `base_model.model.`, or twice                       | a state dict of the model, nested PEFT |
| `.lora_A.NAME.weight`                                  | a state dict of PEFT's model           |
| `.lora_magnitude_vector.weight`                        | a state dict of PEFT's model with DoRA |

Each becomes the key that PEFT writes now. What remains unknown stays as it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lora_core.adapter.json_files import PREFIX
from lora_core.adapter.peft_keys import plain_keys
from lora_core.errors import AdapterError

DATA_PARALLEL = "module."
ADAPTER_NAME = re.compile(
    r"(\.lora_[AB]|\.lora_embedding_[AB]|\.lora_magnitude_vector|\.modules_to_save"
    r"|\.trainable_tokens_delta)\.(?!weight(?:\.|$)|bias(?:\.|$))([^.]+)(?=\.|$)"
)
"""The name of an adapter after the kind of a tensor."""
MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True, eq=False)
class PlainLayout:
    """An adapter's tensors under PEFT's present keys."""

    tensors: dict[str, Tensor]
    changes: tuple[str, ...]
    """What was changed, in words; empty if the keys were those already."""


def plain_layout(tensors: Mapping[str, Tensor], where: str) -> PlainLayout:
    """Return the tensors under the keys that PEFT writes now.

    Args:
        tensors: as a file holds them.
        where: the file, for messages.

    Raises:
        AdapterError: the file holds several adapters, or two tensors get one key and differ.
    """
    changes: list[str] = []
    found = dict(tensors)
    name = _adapter_name(found, where)
    if name is not None:
        changes.append(f"removed the adapter's name {name!r} from the keys")
        found = {ADAPTER_NAME.sub(r"\1.default", key): value for key, value in found.items()}
    unwrapped = plain_keys(found, where)
    if name is None and unwrapped.keys() != found.keys():
        changes.append("removed the parts of paths that wrappers of the model add")
    found, prefix_changes = _with_prefix(unwrapped)
    changes += prefix_changes
    plain = {_plain_magnitude(key): value for key, value in found.items()}
    if plain.keys() != found.keys():
        changes.append(f"renamed {MAGNITUDE[1:]}.weight to {MAGNITUDE[1:]}")
    return PlainLayout(plain, tuple(changes))


def _adapter_name(tensors: Mapping[str, Tensor], where: str) -> str | None:
    """Return the adapter's name in the keys; None if they have none."""
    names: set[str] = set()
    for key in tensors:
        names.update(match[2] for match in ADAPTER_NAME.finditer(key))
    if len(names) > 1:
        raise AdapterError(
            f"{where} holds the adapters {', '.join(sorted(names))}; save one of them alone"
        )
    return next(iter(names), None)


def _with_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors with PEFT's prefix exactly once, and what was changed."""
    changes: list[str] = []
    without_wrapper, wrappers = _stripped(tensors, DATA_PARALLEL)
    if wrappers:
        changes.append(f"removed {DATA_PARALLEL} from the keys")
    bare, prefixes = _stripped(without_wrapper, PREFIX)
    if prefixes == 0:
        changes.append(f"added {PREFIX} to the keys")
    if prefixes > 1:
        changes.append(f"removed a repeated {PREFIX} from the keys")
    return {f"{PREFIX}{key}": value for key, value in bare.items()}, changes


def _stripped(tensors: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], int]:
    """Remove `prefix` while every key starts with it; return how often that was."""
    found = tensors
    times = 0
    while found and all(key.startswith(prefix) for key in found):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
        times += 1
    return found, times


def _plain_magnitude(key: str) -> str:
    return key.removesuffix(".weight") if key.endswith(f"{MAGNITUDE}.weight") else key
