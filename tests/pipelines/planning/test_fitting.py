"""What is said of a training that ran out of memory."""

from typing import Any

import pytest

from pipelines.planning.fitting import TERMS, what_would_fit


def plan(*less: tuple[str, Any, int]) -> dict[str, Any]:
    """Return a plan's figures of two adapters and the control, with what would need less."""
    terms = dict.fromkeys(TERMS, 0)
    ways = [
        {"setting": setting, "value": value, "memory_bytes": size} for setting, value, size in less
    ]
    adapter = {
        **terms,
        "activation_bytes": 9_000_000_000,
        "weight_bytes": 900_000_000,
        "memory_bytes": 10_000_000_000,
        "less": ways,
    }
    control = {
        **terms,
        "optimizer_bytes": 20_000_000_000,
        "memory_bytes": 30_000_000_000,
        "less": [],
    }
    return {
        "runs": {
            "rank-4": {**adapter, "rank": 4},
            "rank-16": {**adapter, "rank": 16},
            "control": control,
        }
    }


CHECKPOINTING = ("training.gradient_checkpointing", True, 4_000_000_000)
ACCUMULATION = ("training.gradient_accumulation_steps", 4, 6_500_000_000)


def test_each_change_has_its_figure() -> None:
    assert what_would_fit(plan(CHECKPOINTING, ACCUMULATION), "rank-4") == (
        "rank-4 was expected to need 10.00 GB in each process (activations 9.00 GB, weights 900 MB); "
        "instead of 10.00 GB, less would do with training.gradient_checkpointing: true (4.00 GB) or training.gradient_accumulation_steps: 4 (6.50 GB)"
    )


def test_one_change_stands_alone() -> None:
    assert what_would_fit(plan(ACCUMULATION), "rank-4").endswith(
        "less would do with training.gradient_accumulation_steps: 4 (6.50 GB)"
    )


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("control", "control"),
        ("control lr 3e-05", "control"),
        ("rank-16 lr 0.001", "rank-16"),
        ("rank-256", "rank-16"),
    ],
)
def test_a_run_is_known_by_its_label_or_stands_for_the_highest_rank(label: str, name: str) -> None:
    assert what_would_fit(plan(ACCUMULATION), label).startswith(f"{name} was expected to need")


def test_where_nothing_helps_that_is_said() -> None:
    assert "no single change of the recipe needs less" in what_would_fit(plan(), "control")
