"""The interval between checkpoints, beside a search and beside a published rate of failures."""

import pytest

from lora_core.budget.checkpoints import (
    FAILURES_PER_GPU_YEAR,
    YEAR_SECONDS,
    best_interval_seconds,
    checkpoint_bytes,
    lost_share,
    seconds_between_failures,
)


def test_a_checkpoint_holds_a_weight_and_two_means() -> None:
    assert checkpoint_bytes(1000) == 3 * 4 * 1000


def test_llama_3_was_interrupted_every_three_hours() -> None:
    """419 times in 54 days on 16,384 GPUs."""
    assert seconds_between_failures(FAILURES_PER_GPU_YEAR, 16_384) == pytest.approx(
        54 * 24 * 3600 / 419, rel=1e-3
    )


def test_twice_as_many_gpus_fail_twice_as_often() -> None:
    assert (
        seconds_between_failures(0.5, 1) == 2 * YEAR_SECONDS == 2 * seconds_between_failures(0.5, 2)
    )


def test_young_by_hand() -> None:
    """A checkpoint of 50 s and a failure a day of 86,400 s: √(2 · 50 · 86,400) = 2939 s."""
    assert best_interval_seconds(50, 86_400) == pytest.approx(2939.4, abs=0.1)


@pytest.mark.parametrize(("write", "between"), [(1, 10_000), (60, 86_400), (300, 10_800)])
def test_no_other_interval_loses_less(write: float, between: float) -> None:
    best = best_interval_seconds(write, between)
    least = min(lost_share(best * (0.5 + step / 1000), write, between) for step in range(1000))
    assert lost_share(best, write, between) <= least


def test_no_checkpoint_is_later_than_the_next_failure() -> None:
    assert best_interval_seconds(500, 600) == 600
