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
    _check_embedding_lr(embedding_lr, has_embedding="embedding" in members)
    learning_rates = {
        "a": learning_rate,
        "b": learning_rate * ratio,
        "vector": learning_rate * ratio,
        "embedding": learning_rate if embedding_lr is None else embedding_lr,
    }
    groups: list[dict[str, Any]] = []
    for role, lr in learning_rates.items():
        if role in members:
            decay = 0.0 if role == "vector" else weight_decay
            groups.append({"params": members[role], "lr": lr, "weight_decay": decay})
    return groups


def _by_role(named_parameters: Named) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters by role; some of them must belong to an adapter."""
    members: dict[str, list[nn.Parameter]] = {}
    trained = 0
    has_adapter = False
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        trained += 1
        parts = set(name.split("."))
        has_adapter |= not parts.isdisjoint(_PAIR | _EMBEDDING)
        role = _role(name, parameter)
        members.setdefault(role, []).append(parameter)
    if not has_adapter:
        raise ConfigError(
            f"none of {trained} trained parameters is a lora_A or lora_B; "
            "inject an adapter before building the optimizer"
        )
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


def _check_embedding_lr(embedding_lr: float | None, *, has_embedding: bool) -> None:
    """Refuse a learning rate of embeddings if none is adapted."""
    if embedding_lr is not None and not has_embedding:
        raise ConfigError(
            f"embedding_lr={embedding_lr!r} has no effect: no embedding is adapted; leave it out"
        )


def _check_weight_decay(weight_decay: float) -> None:
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(
            f"weight_decay={weight_decay!r} must be finite and at least 0; use 0 to switch it off"
        )
