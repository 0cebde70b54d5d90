"""Which modules of a model LoRA can adapt, from their types and shapes alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lora_core.base.quant import base_weight
from lora_core.coverage import has_own_weight
from lora_core.layers.conv import KINDS, is_convolution
from lora_core.layers.multihead_attention import is_attention
from lora_core.modules import plain_modules
from lora_core.targets import CONVOLUTIONS, Layer


@dataclass(frozen=True)
class Candidate:
    """A module that LoRA can adapt."""

    in_features: int
    """Width of A; see `Target.in_features`."""
    out_features: int
    kind: str
    """Storage of the weight: dense, nf4, fp4 or int8."""
    layer: Layer
    groups: int = 1
    """Groups of a convolution."""

    @property
    def smaller_side(self) -> int:
        """The largest possible rank of an update."""
        return min(self.in_features, self.out_features)


def find_candidates(model: nn.Module) -> dict[str, Candidate]:
    """Return all modules that LoRA can adapt, by plain path, in model order.

    Args:
        model: adapted or not.
    """
    found = {}
    for name, module in plain_modules(model).items():
        candidate = _make_candidate(module)
        if candidate is not None and name:  # the root has no parent in which to replace it
            found[name] = candidate
    return found


def _make_candidate(module: nn.Module) -> Candidate | None:
    """Return the shape of a module's update; None if LoRA cannot adapt it."""
    if isinstance(module, nn.MultiheadAttention) and is_attention(module):
        return Candidate(
            in_features=module.embed_dim,
            out_features=3 * module.embed_dim,  # of q, k and v
            kind="dense",
            layer="attention",
        )
    if not has_own_weight(module):
        return None
    if isinstance(module, KINDS) and is_convolution(module):
        in_features = module.in_channels * math.prod(module.kernel_size)
        dimensions = len(module.kernel_size)
        return Candidate(
            in_features=in_features,
            out_features=module.out_channels,
            kind="dense",
            layer=CONVOLUTIONS[dimensions - 1],
            groups=module.groups,
        )
    if isinstance(module, nn.Embedding):
        return Candidate(
            in_features=module.num_embeddings,
            out_features=module.embedding_dim,
            kind="dense",
            layer="embedding",
        )
    weight = base_weight(module)
    if weight is None:
        return None
    out_features, in_features = weight.shape
    return Candidate(
        in_features=in_features,
        out_features=out_features,
        kind=weight.kind,
        layer="linear",
    )


def linear_endings(candidates: Mapping[str, Candidate]) -> str:
    """Return the last parts of the paths of all linear layers, for a message.

    Args:
        candidates: path → candidate.
    """
    endings = set()
    for name, candidate in candidates.items():
        if candidate.layer == "linear":
            last_part = name.rpartition(".")[2]
            endings.add(last_part)
    return ", ".join(sorted(endings)) or "nothing: the model has none"
