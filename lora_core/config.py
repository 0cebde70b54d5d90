"""LoraConfig: what to adapt and how strongly, under PEFT's field names.

Sources: LoRA (Hu et al. 2021, arXiv 2106.09685); rank-stabilized scale (Kalajdzievski 2023,
arXiv 2312.03732); DoRA (Liu et al. 2024, arXiv 2402.09353).
"""

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lora_core.errors import ConfigError

ALL_LINEAR = "all-linear"
InitMethod = str
"""kaiming, gaussian, orthogonal, olora, pissa, pissa_niter_N (N iterations), eva or loftq."""
INITS = re.compile(r"kaiming|gaussian|orthogonal|olora|pissa(_niter_[1-9][0-9]*)?|eva|loftq")
INIT_NAMES = "kaiming, gaussian, orthogonal, olora, pissa, pissa_niter_N, eva, loftq"
DATA_DRIVEN_INITS = {"eva": "data", "loftq": "original"}
"""Initialization that needs more than the model → the argument of `inject` that provides it."""
Bias = Literal["none", "all", "lora_only"]
Names = str | tuple[str, ...]
"""A regular expression that matches complete module paths, or a tuple of paths or path suffixes."""


@dataclass(frozen=True)
class LoraConfig:
    """The settings of one adapter, validated on construction.

    A pattern that matches nothing is an error when the config is applied to a model.

    Raises:
        ConfigError: a value breaks the rule in the docstring of its field.
    """

    r: int
    """Rank of the update, at least 1 and at most the smaller side of any target."""
    lora_alpha: float
    """Numerator of the scale that multiplies B·A; greater than 0."""
    target_modules: Names = ALL_LINEAR
    """`all-linear`, a regular expression, or names.

    `all-linear` is every linear layer except the output head and gates of width 1. Experts that are
    stored as stacks, and routers that hold a bare weight, are parameters and not linear layers:
    name them in `target_parameters`. A warning lists them. PEFT's `all-linear` includes them in
    models such as Mixtral, and doubles r and alpha for `gate_up_proj`.
    """
    exclude_modules: Names = ()
    """Modules excluded from the targets: a regular expression, or names."""
    layers_to_transform: tuple[int, ...] = ()
    """Indices of the blocks to adapt (the first number in a module's path); empty means all."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Suffix of a module's path, as a regular expression → rank; the first match wins."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Suffix of a module's path, as a regular expression → alpha; the first match wins."""
    modules_to_save: tuple[str, ...] = ()
    """Modules fully trained and saved with the adapter, such as a new head.

    As in PEFT, a name selects every module whose path ends with it: `norm` selects
    `input_layernorm` too. Give a path to select one module.
    """
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Path of an embedding, or the end of it → rows to train, such as those of new tokens."""
    target_parameters: tuple[str, ...] = ()
    """Matrices, or stacks of them such as `mlp.experts.gate_up_proj`; paths or suffixes."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of A in training; 0 ≤ p < 1."""
    bias: Bias = "none"
    """Which biases of the base are trained: none, all, or (lora_only) those of the targets."""
    lora_bias: bool = False
    """Add a trained bias to B, multiplied by the scale."""
    use_rslora: bool = False
    """Scale by alpha/√r instead of alpha/r."""
    use_dora: bool = False
    """Train the norm of each row of W0 + s·B·A separately."""
    init_lora_weights: InitMethod = "kaiming"
    """Initialization of A and B.

    The adapted model initially computes what the base computes; with loftq it is closer to the base
    before quantization.
    """

    def __post_init__(self) -> None:
        _check_rank("rank r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        _check_dropout(self.lora_dropout)
        for name in ("lora_bias", "use_rslora", "use_dora"):
            _check_bool(name, getattr(self, name))
        _check_bias(self.bias)
        _check_init(self.init_lora_weights)
        _check_names("target_parameters", self.target_parameters)
        if not (self.target_modules or self.target_parameters):
            raise ConfigError(
                f"target_modules={self.target_modules!r} names nothing; "
                "use 'all-linear', a regular expression or names"
            )
        _check_names("target_modules", self.target_modules)
        _check_names("exclude_modules", self.exclude_modules)
        _check_names("modules_to_save", self.modules_to_save)
        _check_pattern_map("rank_pattern", self.rank_pattern, _check_rank)
        _check_pattern_map("alpha_pattern", self.alpha_pattern, _check_alpha)
        _check_blocks(self.layers_to_transform)
        _check_token_rows(self.trainable_token_indices)
        self._check_combinations()

    def rank_of(self, name: str) -> int:
        """Return the rank of the module at the path `name`."""
        rank = _first_match(self.rank_pattern, name, self.r)
        return int(rank)

    def alpha_of(self, name: str) -> float:
        """Return the alpha of the module at the path `name`."""
        return _first_match(self.alpha_pattern, name, self.lora_alpha)

    def scale_of(self, name: str) -> float:
        """Return the factor of B·A at the path `name`: alpha/r, or alpha/√r under rsLoRA."""
        alpha = self.alpha_of(name)
        rank = self.rank_of(name)
        return self._scale(alpha, rank)

    @property
    def scale(self) -> float:
        """The factor of B·A of modules that no pattern matches."""
        return self._scale(self.lora_alpha, self.r)

    def _scale(self, alpha: float, rank: int) -> float:
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return alpha / divisor

    def _check_combinations(self) -> None:
        """Raise for settings that make each other meaningless."""
        if self.lora_bias and self.use_dora:
            raise ConfigError(
                "lora_bias=True has no meaning under use_dora=True, which scales rows and has no "
                "bias; disable one of them"
            )
        if self.lora_dropout and self.target_parameters:
            raise ConfigError(
                f"lora_dropout={self.lora_dropout!r} has no meaning for target_parameters, "
                "whose inputs are distributed over experts; use 0"
            )
        ranks = (self.r, *self.rank_pattern.values())
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ConfigError(
                f"init_lora_weights='orthogonal' halves the rank, and r={self.r!r} or a "
                "rank_pattern is odd; use even ranks"
            )


def matches_end(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the end of a module's path, by PEFT's rule.

    Args:
        pattern: a key of rank_pattern or alpha_pattern, a regular expression.
        name: the module's path.
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_match(patterns: Mapping[str, float], name: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of the path `name`."""
    for pattern, value in patterns.items():
        if matches_end(pattern, name):
            return value
    return default


def _check_rank(name: str, value: Any) -> None:
    if not _is_index(value) or value == 0:
        raise ConfigError(
            f"{name}={value!r} must be an integer of at least 1; common choices are 4 to 64"
        )


def _check_alpha(name: str, value: Any) -> None:
    if not (_is_number(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be greater than 0; 2·r is a common choice")


def _check_dropout(value: Any) -> None:
    if not (_is_number(value) and 0 <= value < 1):
        raise ConfigError(f"lora_dropout={value!r} must be in [0, 1); use 0 to disable it")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be true or false")


def _check_bias(value: Any) -> None:
    choices = get_args(Bias)
    if value not in choices:
        raise ConfigError(f"bias={value!r} is unknown; use {' or '.join(map(repr, choices))}")


def _check_init(value: Any) -> None:
    if not (isinstance(value, str) and INITS.fullmatch(value)):
        raise ConfigError(f"init_lora_weights={value!r} is unknown; use {INIT_NAMES}")


def _check_names(field_name: str, names: Any) -> None:
    if isinstance(names, str):
        _check_pattern(field_name, names)
        return
    are_names = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    if not are_names or "" in names:
        raise ConfigError(
            f"{field_name}={names!r} names nothing; "
            "use a regular expression or a tuple of module names"
        )


def _check_pattern(field_name: str, pattern: str) -> None:
    """Check that a name or a key of a setting is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{field_name}={pattern!r} is not a valid regular expression ({error}); "
            "escape it or list names"
        ) from error


def _check_pattern_map(
    field_name: str,
    patterns: Any,
    check_value: Callable[[str, Any], None],
) -> None:
    """Check that a setting maps regular expressions to values that `check_value` accepts."""
    if not isinstance(patterns, Mapping):
        raise ConfigError(
            f"{field_name}={patterns!r} must map suffixes of module paths to values, "
            "such as {'q_proj': 8}"
        )
    for pattern, value in patterns.items():
        _check_pattern(field_name, pattern)
        check_value(f"{field_name}[{pattern!r}]", value)


def _check_blocks(layers: Any) -> None:
    if not _are_unique_indices(layers):
        raise ConfigError(
            f"layers_to_transform={layers!r} must be block indices, from 0, without duplicates"
        )


def _check_token_rows(tokens: Any) -> None:
    if not isinstance(tokens, Mapping):
        raise ConfigError(
            f"trainable_token_indices={tokens!r} must map an embedding's name to rows, "
            "such as {'embed_tokens': (5, 6)}"
        )
    for name, rows in tokens.items():
        if not (rows and _are_unique_indices(rows)):
            raise ConfigError(
                f"trainable_token_indices[{name!r}]={rows!r} must be row indices, from 0, "
                "without duplicates and at least one"
            )


def _are_unique_indices(values: Any) -> bool:
    if not isinstance(values, tuple):
        return False
    if not all(_is_index(value) for value in values):
        return False
    return len(set(values)) == len(values)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
