"""Target: one module that gets a low-rank update. `lora_core.planning` chooses the targets."""

from dataclasses import dataclass
from typing import Literal

Layer = Literal[
    "linear", "embedding", "conv1d", "conv2d", "conv3d", "attention", "experts", "parameter"
]
"""Kind of the update; `experts` and `parameter` are updates of named parameters."""
OF_PARAMETERS: tuple[Layer, ...] = ("experts", "parameter")
CONVOLUTIONS: tuple[Layer, ...] = ("conv1d", "conv2d", "conv3d")


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
    groups: int = 1
    """Groups of a convolution: each output has a row of rank/groups in B."""
    extra_weights: int = 0
    """Number of trained weights of a second projection, as in attention."""

    @property
    def trained_weights(self) -> int:
        """Number of weights in A and B."""
        in_b = self.out_features // self.groups
        weights = self.experts * self.rank * (self.in_features + in_b)
        return weights + self.extra_weights
