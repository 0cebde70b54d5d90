"""LoraConfig: what to adapt and how strongly, under PEFT's field names.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685); rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732).
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from lora_core.errors import ConfigError

ALL_LINEAR = "all-linear"
InitMethod = Literal["kaiming", "gaussian"]


@dataclass(frozen=True)
class LoraConfig:
    """One adapter's settings, checked when they are declared.

    Raises:
        ConfigError: a value breaks the rule that stands beside its field.
    """

    r: int
    """Rank of the update, at least 1; no larger than the smaller side of any target (checked on injection)."""
    lora_alpha: float
    """Numerator of the scale that multiplies B·A; above 0."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """`all-linear`, a regular expression that matches whole module names, or names (exact, or the last parts)."""
    lora_dropout: float = 0.0
    """Chance of dropping an input of A while training; 0 ≤ p < 1."""
    use_rslora: bool = False
    """Scale by alpha/√r instead of alpha/r."""
    init_lora_weights: InitMethod = "kaiming"
    """How A starts; B starts at zero, so the adapted model starts as the base."""

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"rank r={self.r!r} must be a whole number of at least 1; common choices are 4 to 64")
        if not (_is_number(self.lora_alpha) and self.lora_alpha > 0):
            raise ConfigError(f"lora_alpha={self.lora_alpha!r} must be above 0; 2·r is a common choice")
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ConfigError(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1); use 0 to switch it off")
        if not isinstance(self.use_rslora, bool):
            raise ConfigError(f"use_rslora={self.use_rslora!r} must be true or false")
        if self.init_lora_weights not in ("kaiming", "gaussian"):
            raise ConfigError(f"init_lora_weights={self.init_lora_weights!r} is unknown; use 'kaiming' or 'gaussian'")
        _check_targets(self.target_modules)

    @property
    def scale(self) -> float:
        """The factor of B·A: alpha/r, or alpha/√r under rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def _check_targets(targets: str | tuple[str, ...]) -> None:
    listed = isinstance(targets, tuple) and all(isinstance(name, str) and name for name in targets)
    if not targets or not (isinstance(targets, str) or listed):
        raise ConfigError(f"target_modules={targets!r} names nothing; use 'all-linear', a regular expression or a list of module names")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(f"target_modules={targets!r} is no regular expression ({error}); escape it or list names") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
