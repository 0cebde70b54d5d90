"""Parameter groups of LoRA+: B has a higher learning rate than A.

With one learning rate for both, the features of a wide layer hardly change: scaled by width, A
needs a learning rate of order 1/in and B one of order 1. LoRA+ gives A the learning rate and B a
multiple of it; 16 is the common choice for language models.

Source: LoRA+ (Hayou et al. 2024, arXiv 2402.12354). The groups and learning rates are those of its
reference implementation and of PEFT.
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
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return the trained parameters as groups for a torch optimizer, with `lr` and `weight_decay`.

    Matrices trained in full have the learning rate of A. Biases, DoRA magnitudes and norms have
    that of B and never decay.

    Args:
        named_parameters: `model.named_parameters()`; frozen ones are skipped.
        learning_rate: of A.
        ratio: learning rate of B over that of A, above 0.
        weight_decay: of matrices.
        embedding_lr: of both factors of an adapted embedding; the default is the learning rate.

    Raises:
        ConfigError: a value is out of range, no adapter is trained, or `embedding_lr` is set and no
            embedding is adapted.
    """
    _check_positive(learning_rate=learning_rate, ratio=ratio, embedding_lr=embedding_lr)
    _check_weight_decay(weight_decay)
    members = _by_role(named_parameters)
    if "embedding" not in members:
        _check_unset(embedding_lr)
    settings = {
        "a": (learning_rate, weight_decay),
        "b": (learning_rate * ratio, weight_decay),
        "vector": (learning_rate * ratio, 0.0),
        "embedding": (learning_rate if embedding_lr is None else embedding_lr, weight_decay),
    }
    return [
        {"params": members[role], "lr": lr, "weight_decay": decay}
        for role, (lr, decay) in settings.items()
        if role in members
    ]


def _by_role(named_parameters: Named) -> dict[str, list[nn.Parameter]]:
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not any((_PAIR | _EMBEDDING) & set(name.split(".")) for name, _ in trained):
        raise ConfigError(
            f"none of {len(trained)} trained parameters is a lora_A or lora_B; "
            "inject an adapter before building the optimizer"
        )
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained:
        members.setdefault(_role(name, parameter), []).append(parameter)
    return members


def _role(name: str, parameter: nn.Parameter) -> Role:
    """Return the role of a parameter by its name.

    As in PEFT, the adapter's name may follow the factor's.
    """
    parts = set(name.split("."))
    if parts & _EMBEDDING:
        return "embedding"
    if parameter.dim() == 1:
        return "vector"
    return "b" if "lora_B" in parts else "a"


def _check_positive(**values: float | None) -> None:
    """Check the values that are set."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"{name}={value!r} must be finite and above 0; "
                "a common learning rate is 2e-4, a common ratio 16"
            )


def _check_unset(embedding_lr: float | None) -> None:
    if embedding_lr is not None:
        raise ConfigError(
            f"embedding_lr={embedding_lr!r} has no effect: no embedding is adapted; leave it out"
        )


def _check_weight_decay(weight_decay: float) -> None:
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(
            f"weight_decay={weight_decay!r} must be finite and at least 0; use 0 to switch it off"
        )
