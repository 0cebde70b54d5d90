"""An invalid LoraConfig raises an error that shows the value; scales match the papers."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core import ConfigError, LoraConfig, LoraError

BAD_VALUES: list[tuple[str, Any]] = [
    ("r", 0),
    ("r", -3),
    ("r", 8.0),
    ("r", "8"),
    ("r", True),
    ("r", None),
    ("lora_alpha", 0),
    ("lora_alpha", -16.5),
    ("lora_alpha", math.inf),
    ("lora_alpha", math.nan),
    ("lora_alpha", "16"),
    ("lora_alpha", None),
    ("lora_dropout", 1.0),
    ("lora_dropout", -0.1),
    ("lora_dropout", math.nan),
    ("lora_dropout", "0.1"),
    ("use_rslora", "no"),
    ("init_lora_weights", "pissa_of_tomorrow"),
    ("bias", "some"),
    ("use_dora", 1),
    ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"q(": 2}),
    ("alpha_pattern", {"q_proj": -1}),
    ("layers_to_transform", (-1,)),
    ("layers_to_transform", (1, 1)),
    ("trainable_token_indices", (1,)),
    ("trainable_token_indices", {"embed_tokens": ()}),
    ("modules_to_save", ("",)),
    ("exclude_modules", 5),
    ("init_lora_weights", True),
    ("target_modules", ""),
    ("target_modules", ()),
    ("target_modules", ("q_proj", "")),
    ("target_modules", ("q_proj", 3)),
    ("target_modules", 7),
    ("target_modules", "q_proj("),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=lambda part: repr(part))
def test_error_shows_invalid_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{"r": 8, "lora_alpha": 16, field: value})
    assert field in str(caught.value)
    parts = [value]
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    assert any(repr(part) in str(caught.value) for part in parts)


def test_config_error_is_value_error_and_lora_error() -> None:
    with pytest.raises(ValueError, match="rank r=0") as caught:
        LoraConfig(r=0, lora_alpha=1)
    assert isinstance(caught.value, LoraError)


@given(r=st.integers(1, 4096), alpha=st.floats(1e-3, 1e6))
def test_scale_matches_papers(r: int, alpha: float) -> None:
    plain = LoraConfig(r=r, lora_alpha=alpha)
    stabilized = LoraConfig(r=r, lora_alpha=alpha, use_rslora=True)
    # One or two float64 rounding errors.
    assert math.isclose(plain.scale * r, alpha, rel_tol=1e-15)
    assert math.isclose(stabilized.scale**2 * r, alpha**2, rel_tol=1e-14)


def test_config_is_immutable() -> None:
    config = LoraConfig(r=8, lora_alpha=16)
    with pytest.raises(FrozenInstanceError):
        config.r = 4  # type: ignore[misc]


def test_defaults_adapt_every_linear_layer_without_dropout() -> None:
    config = LoraConfig(r=8, lora_alpha=16)
    assert config.target_modules == "all-linear"
    assert config.lora_dropout == 0.0
    assert config.use_rslora is False
