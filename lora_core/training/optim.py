"""Parameter groups of LoRA+: B learns faster than A.

With one rate for both, the features of a wide layer hardly move: by width, A wants a rate of order 1/in and B of order
1. LoRA+ gives A the learning rate and B a multiple of it; 16 is the common choice for language models.

Source: LoRA+ (Hayou et al. 2024, arXiv 2402.12354). Groups and rates are those of its reference implementation and PEFT.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from lora_core.errors import ConfigError

Role = Literal["a", "b", "vector", "embedding"]
Named = Iterable[tuple[str, nn.Parameter]]
_PAIR = {"lora_A", "lora_B"}
_EMBEDDING = {"lora_embedding_A", "lora_embedding_B"}


def loraplus_groups(
    named_parameters: Named,
    *,
    learning_rate: float,
    ratio: float,
    weight_decay: float = 0.0,
    embedding_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Return the trained parameters as groups for an optimiser of torch, each with its `lr` and `weight_decay`.

    Matrices trained whole learn as A does. Biases, magnitudes of DoRA and norms learn as B does and never decay.

    Args:
        named_parameters: `model.named_parameters()`; frozen ones are left out.
        learning_rate: of A.
        ratio: rate of B over that of A, above 0.
        weight_decay: of matrices.
        embedding_rate: of both factors of an adapted embedding; the learning rate unless given.

    Raises:
        ConfigError: a value breaks its rule, no adapter is trained, or an embedding rate meets no adapted embedding.
    """
    _check_values(learning_rate, ratio, weight_decay, embedding_rate)
    members = _by_role(named_parameters)
    if embedding_rate is not None and "embedding" not in members:
        raise ConfigError(
            f"embedding_rate={embedding_rate!r} has no effect: no embedding is adapted; leave it out"
        )
    rates = {
        "a": (learning_rate, weight_decay),
        "b": (learning_rate * ratio, weight_decay),
        "vector": (learning_rate * ratio, 0.0),
        "embedding": (learning_rate if embedding_rate is None else embedding_rate, weight_decay),
    }
    return [
        {"params": members[role], "lr": rate, "weight_decay": decay}
        for role, (rate, decay) in rates.items()
        if role in members
    ]


def _by_role(named_parameters: Named) -> dict[str, list[nn.Parameter]]:
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not any((_PAIR | _EMBEDDING) & set(name.split(".")) for name, _ in trained):
        raise ConfigError(
            f"none of {len(trained)} trained parameters is a lora_A or lora_B; inject an adapter before the optimiser is built"
        )
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained:
        members.setdefault(_role(name, parameter), []).append(parameter)
    return members


def _role(name: str, parameter: nn.Parameter) -> Role:
    """Tell by its name how a parameter learns; an adapter's own name, as in PEFT, may follow the factor's."""
    parts = set(name.split("."))
    if parts & _EMBEDDING:
        return "embedding"
    if parameter.dim() == 1:
        return "vector"
    return "b" if "lora_B" in parts else "a"


def _check_values(
    learning_rate: float, ratio: float, weight_decay: float, embedding_rate: float | None
) -> None:
    rates = {
        "learning_rate": learning_rate,
        "ratio": ratio,
        "embedding_rate": 1.0 if embedding_rate is None else embedding_rate,
    }
    for name, value in rates.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"{name}={value!r} must be finite and above 0; a common learning rate is 2e-4, a common ratio 16"
            )
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(
            f"weight_decay={weight_decay!r} must be finite and at least 0; use 0 to switch it off"
        )
