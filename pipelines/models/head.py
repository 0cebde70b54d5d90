"""The output head as a product with a few terms in closed form, where the model's config says that this is what it is.

Whether it is, `pipelines.models.equivalence` finds out; a model whose head does anything else computes its own logits.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lora_core.training.losses import (
    PLAIN,
    LogitTransform,
    linear_cross_entropy,
    token_log_likelihoods,
)

FACTORS = ("logit_scale", "lm_head_multiplier")
"""Names under which configs hold a factor of the logits (Cohere; Falcon-H1)."""
DIVISORS = ("logits_scaling",)
"""Names under which configs hold a divisor of the logits (Granite)."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Names under which configs hold a bound of the logits (Gemma 2 to 4; RecurrentGemma)."""


@dataclass(frozen=True)
class Head:
    """Weight, bias and transform of an output head."""

    weight: Tensor
    """(V, D)"""
    bias: Tensor | None = None
    """(V,)"""
    transform: LogitTransform = PLAIN

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the summed negative log-likelihood of targets (N,) after hidden states (N, D), in nats."""
        return linear_cross_entropy(
            hidden, self.weight, targets, bias=self.bias, transform=self.transform
        )

    def log_likelihoods(
        self, hidden: Tensor, targets: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of each target and whether it is the likeliest."""
        terms = {"bias": self.bias, "transform": self.transform}
        return token_log_likelihoods(hidden, self.weight, targets, chunk_rows=chunk_rows, **terms)  # type: ignore[arg-type]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) in float32."""
        return self.transform.apply_(nn.functional.linear(hidden, self.weight, self.bias).float())


def linear_head(model: PreTrainedModel) -> Head | None:
    """Return a model's head where it is a plain linear layer; None where it is anything else, such as one with an adapter."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    return Head(module.weight, module.bias, logit_transform(model.config.get_text_config()))


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """Return what a config says is done to the logits."""
    scale = 1.0
    for name in FACTORS:
        scale *= _number(config, name) or 1.0
    for name in DIVISORS:
        scale /= _number(config, name) or 1.0
    caps = [cap for name in CAPS if (cap := _number(config, name))]
    return LogitTransform(scale, min(caps, default=None))


def _number(config: PreTrainedConfig, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
