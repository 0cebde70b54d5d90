"""The control in words: how it was trained, at which learning rate, and whether that rate was looked for.

What an adapter is held against must be good at what it does: a control at a poor rate learns little and forgets much, and
flatters every adapter beside it.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from pipelines.config.sections import ControlSection

Losses = Mapping[float, float]


def describe(section: ControlSection, rates: Mapping[float, float | None]) -> dict[str, Any]:
    """Return the control as the summary holds it: method, rates, chosen, words.

    Args:
        section: the recipe's.
        rates: learning rate → loss on the examples kept for that, where several were tried; None, or no finite number, where
            training diverged.

    Raises:
        ValueError: several rates were to be tried, and none is known, or training diverged at each.
    """
    if section.method == "none":
        words = "There is no control: what full fine-tuning would have learnt and forgotten is not known."
        return {"method": "none", "rates": {}, "chosen": None, "words": words}
    if len(section.learning_rate) > 1 and not rates:
        raise ValueError(
            f"control.learning_rate names {len(section.learning_rate)} rates and no loss is known; pass the loss of each"
        )
    losses = {rate: loss for rate, loss in rates.items() if loss is not None and isfinite(loss)}
    if rates and not losses:
        raise ValueError(
            f"training diverged at every rate of control.learning_rate ({_listed(rates)}); name lower ones"
        )
    chosen = min(losses, key=losses.__getitem__) if losses else section.learning_rate[0]
    words = f"The control is {_method(section)} at a learning rate of {chosen:g}{_search(list(rates), losses, chosen)}."
    return {
        "method": section.method,
        "rates": {f"{rate:g}": losses.get(rate) for rate in sorted(rates)},
        "chosen": chosen,
        "words": words,
    }


def _method(section: ControlSection) -> str:
    if section.method == "full":
        return "full fine-tuning"
    return f"an adapter of rank {section.rank} over the adapters' own base, in place of full fine-tuning,"


def _search(tried: list[float], losses: Losses, chosen: float) -> str:
    """Say how the rate was found, where training diverged, and whether a better one may lie beyond those tried."""
    if len(tried) < 2:
        return ", the only one tried"
    diverged = [rate for rate in tried if rate not in losses]
    failed = f"; training diverged at {_listed(diverged)}" if diverged else ""
    end = "lowest" if chosen == min(tried) else "highest" if chosen == max(tried) else None
    return (
        _found(len(tried), losses, chosen)
        + failed
        + (f"; it is the {end} tried, and a better one may lie beyond" if end else "")
    )


def _found(tried: int, losses: Losses, chosen: float) -> str:
    if len(losses) == 1:
        return f", the only one of {tried} at which training did not diverge (a loss of {losses[chosen]:.3f})"
    others = ", ".join(
        f"{loss:.3f} at {rate:g}" for rate, loss in sorted(losses.items()) if rate != chosen
    )
    return f", the best of {tried} by the loss on examples kept for that ({losses[chosen]:.3f}; {others})"


def _listed(rates: Mapping[float, Any] | list[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted(rates))
