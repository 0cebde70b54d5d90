"""The advice for a training that ran out of memory."""

from typing import Any

import pytest

from pipelines.planning.fitting import TERMS, what_would_fit

CHECKPOINTING = {
    "setting": "training.gradient_checkpointing",
    "value": True,
    "memory_bytes": 4_000_000_000,
}
ACCUMULATION = {
    "setting": "training.gradient_accumulation_steps",
    "value": 4,
    "memory_bytes": 6_500_000_000,
}


def plan(*changes: dict[str, Any]) -> dict[str, Any]:
    """Return a plan of two adapters and the control; `changes` need less memory."""
    terms = dict.fromkeys(TERMS, 0)
    adapter = {
        **terms,
        "activation_bytes": 9_000_000_000,
        "weight_bytes": 900_000_000,
        "memory_bytes": 10_000_000_000,
        "less": list(changes),
    }
    control = {
        **terms,
        "optimizer_bytes": 20_000_000_000,
        "memory_bytes": 30_000_000_000,
        "less": [],
    }
    runs = {
        "rank-4": {**adapter, "rank": 4},
        "rank-16": {**adapter, "rank": 16},
        "control": control,
    }
    return {"runs": runs}


def test_each_change_has_its_memory() -> None:
    assert what_would_fit(plan(CHECKPOINTING, ACCUMULATION), "rank-4") == (
        "rank-4 was expected to need 10.00 GB in each process "
        "(activations 9.00 GB, weights 900 MB); less memory is needed with "
        "training.gradient_checkpointing: true (4.00 GB) or "
        "training.gradient_accumulation_steps: 4 (6.50 GB)"
    )


def test_a_single_change() -> None:
    assert what_would_fit(plan(ACCUMULATION), "rank-4").endswith(
        "less memory is needed with training.gradient_accumulation_steps: 4 (6.50 GB)"
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
def test_an_unknown_label_uses_the_highest_rank(label: str, name: str) -> None:
    assert what_would_fit(plan(ACCUMULATION), label).startswith(f"{name} was expected to need")


def test_the_advice_reports_that_no_change_needs_less() -> None:
    assert "no single change of the recipe needs less" in what_would_fit(plan(), "control")
