"""Which figure sees that a model forgot: each figure's change for models that forgot more and less.

The pushed control is taken at its last step, where it has surely forgotten, and the other models as they are. A figure
that sees forgetting falls there, by an interval below zero; one that rises while abilities fall misleads.
"""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
Values = dict[str, Any]
FIGURES = {
    "accuracy": "share",
    "choice_probability": "share",
    "margin": "nats a byte",
    "text_loss": "nats a byte",
    "chat_loss": "nats a token",
}
"""Figure of the summary's `change` → its unit; positive is better for all of them."""


def sight_rows(tuned: Values, pushed: Values) -> Iterator[Row]:
    """Yield each figure's change by training for the pushed control, the tuned one and the highest rank."""
    highest = max((model for model in tuned["models"].values() if "verdict" in model), key=lambda model: model["rank"])
    subjects = {"pushed control": pushed["models"]["control"], "tuned control": tuned["models"]["control"], highest["label"]: highest}
    for who, model in subjects.items():
        yield row(f"{who}: task loss", model["scores"]["task_loss"], "nats a token")
    for figure, unit in FIGURES.items():
        for who, model in subjects.items():
            yield from seen(figure, unit, who, model["change"][figure])
    for who, model in subjects.items():
        if model["change"]["kl"] is not None:
            yield row(f"{who}: KL from its base on chat-formatted questions", model["change"]["kl"], "nats a token")
    yield from lambada(subjects)
    change = pushed["models"]["control"]["change"]["choice_probability"]
    yield row("the pushed control forgot, by choice probability", change["high"], "upper end", "< 0", holds=change["high"] < 0)


def seen(figure: str, unit: str, who: str, change: Values | None) -> Iterator[Row]:
    """Yield a figure's change, and what its interval says."""
    if change is None:
        return
    says = "worse" if change["high"] < 0 else "better" if change["low"] > 0 else "cannot tell"
    yield row(f"{who}: {figure} ({change['low']:+.3f} to {change['high']:+.3f}): {says}", change["mean"], unit)


def lambada(subjects: dict[str, Values]) -> Iterator[Row]:
    """Yield the change of choice probability on LAMBADA by itself."""
    for who, model in subjects.items():
        change = model["change"]["benchmarks"].get("lambada")
        if change is not None:
            yield from seen("choice probability on LAMBADA", "share", who, change)


def row(what: str, value: float, unit: str, goal: str | None = None, *, holds: bool | None = None) -> Row:
    """Return one figure."""
    return {"what": what, "value": value, "unit": unit, "goal": goal, "holds": holds}
