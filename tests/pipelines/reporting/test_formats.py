"""Numbers have three digits and a unit; differences have a sign."""

import pytest

from pipelines.reporting.formats import duration, p_value, scaled, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (512, "512"),
        (999.6, "1.00\u00a0k"),
        (4_884_480, "4.88\u00a0M"),
        (99_960_000, "100\u00a0M"),
    ],
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert scaled(value, ("", "k", "M", "G")) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.7234, "+0.723"), (-0.0066, "−0.007"), (-0.0004, "0.000"), (0.0, "0.000")]
)
def test_differences_have_a_sign_unless_they_round_to_zero(value: float, text: str) -> None:
    assert signed(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.012 s"),
        (16.04, "16.0 s"),
        (119.6, "2 min 00 s"),
        (760.2, "12 min 40 s"),
        (8290, "2 h 18 min"),
        (200_000, "2.31 days"),
    ],
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0321, "p\u00a00.032"), (0.5, "p\u00a00.5"), (0.0002, "p\u00a0<\u00a00.001")],
)
def test_p_values_have_two_digits(value: float, text: str) -> None:
    assert p_value(value) == text
