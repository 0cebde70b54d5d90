"""Target: one module that gets a low-rank update. `lora_core.planning` chooses the targets."""

from dataclasses import dataclass
from typing import Literal

Layer = Literal["linear", "embedding", "conv2d", "experts"]


@dataclass(frozen=True)
class Target:
    """One module that gets a low-rank update."""

    name: str
    """Module path in the model, such as `model.layers.0.mlp.up_proj`."""
    in_features: int
    """Width of A. Embedding: vocabulary size; convolution: input channels × kernel positions."""
    out_features: int
    rank: int
    scale: float
    """The factor that multiplies B·A."""
    kind: str
    """Storage of the base weight: dense, nf4, fp4 or int8."""
    layer: Layer = "linear"
    experts: int = 1
    """Number of matrices of this shape in a stack of experts."""

    @property
    def trained_weights(self) -> int:
        """Number of weights in A and B."""
        return self.experts * self.rank * (self.in_features + self.out_features)
