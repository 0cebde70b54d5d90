"""The checkpoint interval matches a grid search and a published failure rate."""

import pytest

from lora_core.budget.checkpoints import (
    FAILURES_PER_GPU_YEAR,
    YEAR_SECONDS,
    best_interval_seconds,
    checkpoint_bytes,
    lost_fraction,
    seconds_between_failures,
)


def test_checkpoint_has_weight_and_two_moments() -> None:
    assert checkpoint_bytes(1000) == 3 * 4 * 1000


def test_failure_rate_matches_llama_3() -> None:
    """Llama 3 was interrupted 419 times in 54 days on 16,384 GPUs: every three hours."""
    assert seconds_between_failures(FAILURES_PER_GPU_YEAR, 16_384) == pytest.approx(
        54 * 24 * 3600 / 419, rel=1e-3
    )


def test_twice_as_many_gpus_fail_twice_as_often() -> None:
    assert seconds_between_failures(0.5, 1) == 2 * YEAR_SECONDS
    assert seconds_between_failures(0.5, 2) == YEAR_SECONDS


def test_interval_matches_hand_calculation() -> None:
    """A checkpoint takes 50 s, and a failure occurs every 86,400 s: √(2 · 50 · 86,400) = 2939 s."""
    assert best_interval_seconds(50, 86_400) == pytest.approx(2939.4, abs=0.1)


@pytest.mark.parametrize(("write", "between"), [(1, 10_000), (60, 86_400), (300, 10_800)])
def test_best_interval_loses_least(write: float, between: float) -> None:
    best = best_interval_seconds(write, between)
    least = min(lost_fraction(best * (0.5 + step / 1000), write, between) for step in range(1000))
    assert lost_fraction(best, write, between) <= least


def test_interval_is_at_most_time_between_failures() -> None:
    assert best_interval_seconds(500, 600) == 600
