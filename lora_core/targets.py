"""Target: one module that gets an update; see `lora_core.planning` for how targets are chosen."""

from dataclasses import dataclass
from typing import Literal

Layer = Literal["linear", "embedding", "conv2d", "experts"]


@dataclass(frozen=True)
class Target:
    """One module that gets an update."""

    name: str
    """Module path in the model, such as `model.layers.0.mlp.up_proj`."""
    in_features: int
    """Width of A: of an embedding the vocabulary, of a convolution the channels and places it looks at."""
    out_features: int
    rank: int
    scale: float
    """Factor of B·A."""
    kind: str
    """How the base weight is stored: dense, nf4, fp4 or int8."""
    layer: Layer = "linear"
    experts: int = 1
    """Matrices of this shape in a stack of experts."""

    @property
    def trained_weights(self) -> int:
        """Weights of A and B."""
        return self.experts * self.rank * (self.in_features + self.out_features)
