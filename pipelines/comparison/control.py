"""How the control was trained, at which learning rate, and how that rate was chosen.

The control must be good at the task: a control at a poor learning rate learns little and forgets
much, and makes every adapter look good.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from pipelines.comparison.document import ControlSummary
from pipelines.config.sections import ControlSection

Losses = Mapping[float, float]
"""Learning rate → loss."""


def describe(section: ControlSection, rates: Mapping[float, float | None]) -> ControlSummary:
    """Return the control as it is stored in the summary.

    Args:
        section: the recipe's control section.
        rates: learning rate → loss on the tuning examples, if several were tried; None, or not
            finite, if training diverged.

    Raises:
        ValueError: several rates are configured, and no loss is known or training diverged at each.
    """
    if section.method == "none":
        words = (
            "There is no control: "
            "what full fine-tuning would have learned and forgotten is unknown."
        )
        return ControlSummary(method="none", words=words)
    losses = _finite_losses(section, rates)
    chosen = min(losses, key=losses.__getitem__) if losses else section.learning_rate[0]
    method = _method(section)
    search = _search(list(rates), losses, chosen)
    return ControlSummary(
        method=section.method,
        rates={f"{rate:g}": losses.get(rate) for rate in sorted(rates)},
        chosen=chosen,
        words=f"The control is {method} at a learning rate of {chosen:g}{search}.",
    )


def _finite_losses(
    section: ControlSection, rates: Mapping[float, float | None]
) -> dict[float, float]:
    """Return the rates at which training did not diverge, each with its loss."""
    configured = len(section.learning_rate)
    if configured > 1 and not rates:
        raise ValueError(
            f"control.learning_rate has {configured} rates and no loss is known; "
            "pass the loss of each"
        )
    losses = {}
    for rate, loss in rates.items():
        if loss is not None and isfinite(loss):
            losses[rate] = loss
    if rates and not losses:
        raise ValueError(
            f"training diverged at every rate of control.learning_rate ({_listed(rates)}); "
            "use lower ones"
        )
    return losses


def _method(section: ControlSection) -> str:
    if section.method == "full":
        return "full fine-tuning"
    return (
        f"an adapter of rank {section.rank} over the adapters' own base, "
        "in place of full fine-tuning,"
    )


def _search(tried: list[float], losses: Losses, chosen: float) -> str:
    """Describe how the rate was chosen, and where training diverged."""
    if len(tried) < 2:
        return ", the only one tried"
    text = _choice(len(tried), losses, chosen)
    diverged = [rate for rate in tried if rate not in losses]
    if diverged:
        text += f"; training diverged at {_listed(diverged)}"
    if chosen == min(tried):
        text += "; it is the lowest rate tried, and a lower one may be better"
    elif chosen == max(tried):
        text += "; it is the highest rate tried, and a higher one may be better"
    return text


def _choice(tried: int, losses: Losses, chosen: float) -> str:
    best = losses[chosen]
    if len(losses) == 1:
        return f", the only one of {tried} at which training did not diverge (a loss of {best:.3f})"
    others = []
    for rate in sorted(losses):
        if rate != chosen:
            others.append(f"{losses[rate]:.3f} at {rate:g}")
    return (
        f", the best of {tried} by the loss on the tuning examples "
        f"({best:.3f}; {', '.join(others)})"
    )


def _listed(rates: Mapping[float, Any] | list[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(rates))
