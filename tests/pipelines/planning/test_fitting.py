"""The advice for a training that ran out of memory."""

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.planning.fitting import what_would_fit
from pipelines.runtime.interfaces.plan_result import PlanResult

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
Plan = Callable[..., PlanResult]


@pytest.fixture
def plan(plan_result: Callable[..., PlanResult]) -> Plan:
    """Return a function that makes a plan of two adapters and the control.

    Its arguments are the changes with which an adapter needs less memory.
    """

    def make(*changes: dict[str, Any]) -> PlanResult:
        cost = {
            "activation_bytes": 9_000_000_000,
            "weight_bytes": 900_000_000,
            "memory_bytes": 10_000_000_000,
            "less": changes,
        }
        runs: dict[str, dict[str, Any]] = {}
        for rank in (4, 16):
            adapter = {"rank": rank, "scale": 1, "file_rank": rank}
            runs[f"rank-{rank}"] = {**cost, "adapter": adapter}
        runs["control"] = {"optimizer_bytes": 20_000_000_000, "memory_bytes": 30_000_000_000}
        return plan_result(runs)

    return make


def test_each_change_has_its_memory(plan: Plan) -> None:
    assert what_would_fit(plan(CHECKPOINTING, ACCUMULATION), "rank-4") == (
        "rank-4 was expected to need 10.0\u00a0GB in each process "
        "(activations 9.00\u00a0GB, weights 900\u00a0MB); less memory is needed with "
        "training.gradient_checkpointing: true (4.00\u00a0GB) or "
        "training.gradient_accumulation_steps: 4 (6.50\u00a0GB)"
    )


def test_a_single_change(plan: Plan) -> None:
    assert what_would_fit(plan(ACCUMULATION), "rank-4").endswith(
        "less memory is needed with training.gradient_accumulation_steps: 4 (6.50\u00a0GB)"
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
def test_an_unknown_label_uses_the_highest_rank(plan: Plan, label: str, name: str) -> None:
    assert what_would_fit(plan(ACCUMULATION), label).startswith(f"{name} was expected to need")


def test_the_advice_reports_that_no_change_needs_less(plan: Plan) -> None:
    assert "no single change of the recipe needs less" in what_would_fit(plan(), "control")
