"""The output head as a product with a few terms in closed form, if the model's config implies it.

`pipelines.models.equivalence` verifies that. A model with any other head computes its own logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lora_core.training.losses import (
    PLAIN,
    Chunks,
    LogitTransform,
    linear_cross_entropy,
    token_log_likelihoods,
)

FACTORS = ("logit_scale", "lm_head_multiplier")
"""Names of a factor of the logits in configs (Cohere; Falcon-H1)."""
DIVISORS = ("logits_scaling",)
"""Names of a divisor of the logits in configs (Granite)."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Names of a bound of the logits in configs (Gemma 2 to 4; RecurrentGemma)."""


@dataclass(frozen=True)
class Head:
    """Weight, bias and transform of an output head."""

    weight: Tensor
    """(V, D)"""
    bias: Tensor | None = None
    """(V,)"""
    transform: LogitTransform = PLAIN

    def loss(
        self, hidden: Tensor, targets: Tensor, gradient_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the summed NLL of targets (N,) after hidden states (N, D), in nats.

        Args:
            hidden: (N, D) states of the positions that predict.
            targets: (N,) ids of the next tokens.
            gradient_dtype: of the product that gives the gradient of `hidden`; None for that of
                the logits.
        """
        return linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            transform=self.transform,
            chunks=Chunks(gradient_dtype=gradient_dtype),
        )

    def log_likelihoods(
        self, hidden: Tensor, targets: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each target and whether it is the likeliest.

        Args:
            hidden: (N, D) states of the positions that predict.
            targets: (N,) ids of the next tokens.
            chunk_rows: number of positions whose logits exist at the same time.

        Returns:
            (N,) float32 in nats, and (N,) bool.
        """
        return token_log_likelihoods(
            hidden,
            self.weight,
            targets,
            chunk_rows=chunk_rows,
            bias=self.bias,
            transform=self.transform,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) in float32."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return self.transform.apply_(logits.float())


def linear_head(model: PreTrainedModel) -> Head | None:
    """Return a model's head if it is a plain linear layer, else None, such as with an adapter."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    return Head(module.weight, module.bias, logit_transform(model.config.get_text_config()))


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """Return the transform of the logits that a config names."""
    scale = 1.0
    for name in FACTORS:
        scale *= _number(config, name) or 1.0
    for name in DIVISORS:
        scale /= _number(config, name) or 1.0
    caps = [_number(config, name) for name in CAPS]
    present = [cap for cap in caps if cap]
    return LogitTransform(scale, min(present, default=None))


def _number(config: PreTrainedConfig, name: str) -> float | None:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
