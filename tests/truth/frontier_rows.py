"""Learning versus forgetting over ranks, learning rates, steps and truncations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.comparison.differences import drop_beyond_control, task_gain
from pipelines.comparison.record_files import read_items

Row = dict[str, Any]
Values = dict[str, Any]


def frontier_rows(summary: Values) -> Iterator[Row]:
    """Yield each point's gain and general change, the control's losses, the recommendation."""
    for rate, loss in summary["control"]["rates"].items():
        yield row(
            f"control at a rate of {rate}: loss on the tuning examples",
            "diverged" if loss is None else loss,
            "nats a token",
        )
    for point in summary["frontier"]:
        what = f"{point['label']} (step {point['step']}, rate {point['learning_rate']:g})"
        yield row(f"{what}: task gain", point["gain"]["mean"], "nats a token")
        general = point["general"]
        yield row(
            f"{what}: general change ({general['low']:+.3f} to {general['high']:+.3f})",
            general["mean"],
            "choice probability",
        )
    recommended = summary["recommended"]
    yield row(
        "recommended",
        "none" if recommended is None else f"{recommended['label']}: {recommended['reason']}",
        "",
    )


def finding_rows(summary: Values) -> Iterator[Row]:
    """Yield how much less than the control each rank learned and forgot, on the same items."""
    items = {
        label: read_items(Path(summary["items"][label]))
        for label in ("base", "base-nf4", "control", *ranks(summary))
    }
    for label in ranks(summary):
        less = task_gain(items[label], items["control"])
        yield verdict(f"{label} learnt less than the control by", less, "nats a token")
        kept = drop_beyond_control(
            items["control"],
            items[label],
            control_base=items["base"],
            adapter_base=items["base-nf4"],
        )
        yield verdict(
            f"{label} kept more general ability than the control by", kept, "choice probability"
        )


def ranks(summary: Values) -> list[str]:
    """Return the labels of the adapters."""
    return [label for label, model in summary["models"].items() if model["judgment"] is not None]


def verdict(what: str, found: Any, unit: str) -> Row:
    """Return a difference, and whether its interval confirms the published finding."""
    if found.low > 0:
        conclusion = "holds"
    elif found.high < 0:
        conclusion = "the contrary holds"
    else:
        conclusion = "cannot be told"
    return row(f"{what} ({found.low:+.3f} to {found.high:+.3f}): {conclusion}", found.mean, unit)


def row(what: str, value: float | str, unit: str) -> Row:
    """Return one result."""
    return {"what": what, "value": value, "unit": unit, "goal": None, "holds": None}
