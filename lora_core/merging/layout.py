"""Which square weights of a checkpoint are stored as (in, out): those of GPT-2's `Conv1D`.

The shapes of A and B show the layout of any other weight. PEFT's `fan_in_fan_out` does not decide:
it is one flag for an adapter, set by the last module that PEFT adapted, and a model can have both
layouts, such as BERT with a GPT-2 decoder. This library therefore records the modules in the
sidecar. For PEFT's adapters, the names decide, and the biases next to weights that are not square:
a bias is as long as the output is wide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.adapter.json_files import CONFIG, TRANSPOSED, read_json
from lora_core.base.weight_files import Checkpoint, module_name
from lora_core.errors import MergeError

CONV1D_NAMES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""Names of every `Conv1D` in transformers: GPT, GPT-2, ImageGPT, CLVP, Decision Transformer."""


@dataclass(frozen=True)
class WeightLayout:
    """What an adapter's files reveal about the layout of the base's square weights."""

    adapter: Path
    """The adapter's folder, for messages."""
    fan_in_fan_out: bool
    """PEFT's flag, which is true for some adapters of modules that are stored as (in, out)."""
    recorded: frozenset[str] | None
    """The modules of the base that are stored as (in, out); None if the sidecar has no record."""
    by_parent: Mapping[str, bool]
    """Parent of modules with such names → whether they are (in, out), as their biases show."""

    def is_transposed(self, module: str, tensor: str) -> bool:
        """Return whether the square weight of `module` is stored as (in, out).

        Args:
            module: its path in the model.
            tensor: the name of its weight in the files.

        Raises:
            MergeError: the files do not show it.
        """
        if self.recorded is not None:
            return module in self.recorded
        found = set(self.by_parent.values())
        if module_name(module) in CONV1D_NAMES:
            parent = _parent(tensor)
            if parent in self.by_parent:
                return self.by_parent[parent]
            return found == {True} or (not found and self.fan_in_fan_out)
        if not self.fan_in_fan_out or True in found:
            return False
        raise MergeError(
            f"{self.adapter} sets fan_in_fan_out=True, and whether the square weight of {module} "
            "is one of those stored as (in, out) is not known; merge it in memory and save the "
            "model, or load the adapter and save it with save_adapter, which records the layout"
        )


def read_layout(
    adapter: Path,
    identity: Mapping[str, Any] | None,
    checkpoint: Checkpoint,
) -> WeightLayout:
    """Return what the files of an adapter and the shapes of its base show.

    Args:
        adapter: its folder, for the settings and for messages.
        identity: its sidecar, if it has one.
        checkpoint: the base.

    Raises:
        AdapterError: the settings are missing or malformed.
    """
    settings = read_json(adapter / CONFIG)
    recorded = None if identity is None else identity.get(TRANSPOSED)
    return WeightLayout(
        adapter=adapter,
        fan_in_fan_out=bool(settings.get("fan_in_fan_out")),
        recorded=None if recorded is None else frozenset(recorded),
        by_parent=_layout_by_parent(checkpoint),
    )


def _layout_by_parent(checkpoint: Checkpoint) -> dict[str, bool]:
    """Compare the biases of modules with a name of `Conv1D` with their weights."""
    found: dict[str, bool] = {}
    for name, entry in checkpoint.entries.items():
        path = name.removesuffix(".weight")
        is_matrix = path != name and len(entry.shape) == 2
        bias = checkpoint.entries.get(f"{path}.bias")
        if bias is None or not is_matrix or module_name(name) not in CONV1D_NAMES:
            continue
        first, last = entry.shape
        if first != last:
            found[_parent(name)] = bias.shape == (last,)
    return found


def _parent(tensor: str) -> str:
    """Return the path of the module that contains the owner of the weight `tensor`."""
    owner = tensor.removesuffix(".weight")
    return owner.rpartition(".")[0]
