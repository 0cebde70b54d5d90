"""LoraConfig: what to adapt and how strongly, under PEFT's field names.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685); rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732); DoRA
(Liu et al. 2024, arXiv 2402.09353).
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lora_core.errors import ConfigError

ALL_LINEAR = "all-linear"
InitMethod = str
"""kaiming, gaussian, orthogonal, olora, pissa, pissa_niter_N for N steps of subspace iteration, eva, or loftq."""
INITS = re.compile(r"kaiming|gaussian|orthogonal|olora|pissa(_niter_[1-9][0-9]*)?|eva|loftq")
INIT_WORDS = "kaiming, gaussian, orthogonal, olora, pissa, pissa_niter_N, eva, loftq"
DATA_DRIVEN_INITS = {"eva": "data", "loftq": "original"}
"""Start that needs more than the model → the argument of `inject` that brings it."""
Bias = Literal["none", "all", "lora_only"]
Names = str | tuple[str, ...]
"""A regular expression that matches whole module names, or names: exact, or their last parts."""


@dataclass(frozen=True)
class LoraConfig:
    """One adapter's settings, checked when they are declared.

    A pattern that matches nothing is refused when the config meets a model.

    Raises:
        ConfigError: a value breaks the rule that stands beside its field.
    """

    r: int
    """Rank of the update, at least 1; no larger than the smaller side of any target (checked on injection)."""
    lora_alpha: float
    """Numerator of the scale that multiplies B·A; above 0."""
    target_modules: Names = ALL_LINEAR
    """`all-linear` (every linear layer but the output head and gates of width 1), a regular expression, or names."""
    exclude_modules: Names = ()
    """Modules that are left out of the targets: a regular expression, or names."""
    layers_to_transform: tuple[int, ...] = ()
    """Numbers of the blocks to adapt, the first number in a module's path; all when empty."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """End of a module's path, as a regular expression → rank; the first that matches is taken."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """End of a module's path, as a regular expression → alpha."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole and saved with the adapter, such as a new head; exact names or last parts."""
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Embedding's name, or its last part → rows that are trained, such as those of new special tokens."""
    target_parameters: tuple[str, ...] = ()
    """Stacked weights of experts, such as `mlp.experts.gate_up_proj`; whole paths or their last parts."""
    lora_dropout: float = 0.0
    """Chance of dropping an input of A while training; 0 ≤ p < 1."""
    bias: Bias = "none"
    """Which of the base's biases are trained: none, all, or (lora_only) those of the targets."""
    lora_bias: bool = False
    """Give B a bias of its own, inside the scale."""
    use_rslora: bool = False
    """Scale by alpha/√r instead of alpha/r."""
    use_dora: bool = False
    """Train the length of each row of W0 + s·B·A by itself."""
    init_lora_weights: InitMethod = "kaiming"
    """How A and B start: the adapted model starts as the base, but with loftq nearer to the base before it was rounded."""

    def __post_init__(self) -> None:
        _check_rank("rank r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        _check_dropout(self.lora_dropout)
        for name in ("lora_bias", "use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.bias not in get_args(Bias):
            raise ConfigError(
                f"bias={self.bias!r} is unknown; use {' or '.join(map(repr, get_args(Bias)))}"
            )
        if not (
            isinstance(self.init_lora_weights, str) and INITS.fullmatch(self.init_lora_weights)
        ):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} is unknown; use {INIT_WORDS}"
            )
        _check_names("target_parameters", self.target_parameters)
        if not (self.target_modules or self.target_parameters):
            raise ConfigError(
                f"target_modules={self.target_modules!r} names nothing; use 'all-linear', a regular expression or names"
            )
        _check_names("target_modules", self.target_modules)
        _check_names("exclude_modules", self.exclude_modules)
        _check_names("modules_to_save", self.modules_to_save)
        _check_patterns(self.rank_pattern, self.alpha_pattern)
        _check_rows(self.layers_to_transform, self.trainable_token_indices)
        self._check_together()

    def rank_of(self, name: str) -> int:
        """The rank of the module at the path `name`."""
        return int(_first_match(self.rank_pattern, name, self.r))

    def alpha_of(self, name: str) -> float:
        """The alpha of the module at the path `name`."""
        return _first_match(self.alpha_pattern, name, self.lora_alpha)

    def scale_of(self, name: str) -> float:
        """The factor of B·A at the path `name`: alpha/r, or alpha/√r under rsLoRA."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def scale(self) -> float:
        """The factor of B·A where no pattern says otherwise."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def _check_together(self) -> None:
        """Refuse settings that would take each other's meaning away."""
        if self.lora_bias and self.use_dora:
            raise ConfigError(
                "lora_bias=True has no meaning under use_dora=True, which scales rows and has no bias; switch one off"
            )
        if self.lora_dropout and self.target_parameters:
            raise ConfigError(
                f"lora_dropout={self.lora_dropout!r} has no meaning for target_parameters, whose inputs are shared out; use 0"
            )
        if self.init_lora_weights == "orthogonal" and any(
            rank % 2 for rank in (self.r, *self.rank_pattern.values())
        ):
            raise ConfigError(
                f"init_lora_weights='orthogonal' halves the rank, and r={self.r!r} or a rank_pattern is odd; use even ranks"
            )


def matches_end(pattern: str, name: str) -> bool:
    """Tell whether a key of a pattern matches the end of a module's path, as PEFT asks it."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_match(patterns: Mapping[str, float], name: str, default: float) -> float:
    return next(
        (value for pattern, value in patterns.items() if matches_end(pattern, name)), default
    )


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{name}={value!r} must be a whole number of at least 1; common choices are 4 to 64"
        )


def _check_alpha(name: str, value: Any) -> None:
    if not (_is_number(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be above 0; 2·r is a common choice")


def _check_dropout(value: Any) -> None:
    if not (_is_number(value) and 0 <= value < 1):
        raise ConfigError(f"lora_dropout={value!r} must lie in [0, 1); use 0 to switch it off")


def _check_names(field_name: str, names: Any) -> None:
    listed = isinstance(names, tuple) and all(isinstance(name, str) and name for name in names)
    if not (listed or isinstance(names, str)):
        raise ConfigError(
            f"{field_name}={names!r} names nothing; use a regular expression or a tuple of module names"
        )
    if isinstance(names, str):
        _check_pattern(field_name, names)


def _check_pattern(field_name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{field_name}={pattern!r} is no regular expression ({error}); escape it or list names"
        ) from error


def _check_patterns(ranks: Any, alphas: Any) -> None:
    for field_name, patterns, check in (
        ("rank_pattern", ranks, _check_rank),
        ("alpha_pattern", alphas, _check_alpha),
    ):
        if not isinstance(patterns, Mapping):
            raise ConfigError(
                f"{field_name}={patterns!r} must map ends of module paths to values, such as {{'q_proj': 8}}"
            )
        for pattern, value in patterns.items():
            _check_pattern(field_name, pattern)
            check(f"{field_name}[{pattern!r}]", value)


def _check_rows(layers: Any, tokens: Any) -> None:
    if not _are_places(layers):
        raise ConfigError(
            f"layers_to_transform={layers!r} must be numbers of blocks, from 0, each once"
        )
    if not isinstance(tokens, Mapping):
        raise ConfigError(
            f"trainable_token_indices={tokens!r} must map an embedding's name to rows, such as {{'embed_tokens': (5, 6)}}"
        )
    for name, rows in tokens.items():
        if not rows or not _are_places(rows):
            raise ConfigError(
                f"trainable_token_indices[{name!r}]={rows!r} must be row numbers, from 0, each once and at least one"
            )


def _are_places(values: Any) -> bool:
    whole = isinstance(values, tuple) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )
    return whole and len(set(values)) == len(values)


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
