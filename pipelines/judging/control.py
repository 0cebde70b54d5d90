"""The control in words: how it was trained, at which learning rate, and whether that rate was looked for.

What an adapter is held against must be good at what it does: a control at a poor rate learns little and forgets much, and
flatters every adapter beside it.
"""

from collections.abc import Mapping
from typing import Any

from pipelines.recipe import ControlSection


def describe(section: ControlSection, rates: Mapping[float, float]) -> dict[str, Any]:
    """Return the control as the summary holds it: method, rates, chosen, words.

    Args:
        section: the recipe's.
        rates: learning rate → loss on the examples kept for that, where several were tried.

    Raises:
        ValueError: several rates were to be tried, and none is known.
    """
    if section.method == "none":
        words = "There is no control: what full fine-tuning would have learnt and forgotten is not known."
        return {"method": "none", "rates": {}, "chosen": None, "words": words}
    if len(section.learning_rate) > 1 and not rates:
        raise ValueError(f"control.learning_rate names {len(section.learning_rate)} rates and no loss is known; pass the loss of each")
    chosen = min(rates, key=rates.__getitem__) if rates else section.learning_rate[0]
    words = f"The control is {_method(section)} at a learning rate of {chosen:g}{_search(rates, chosen)}."
    return {
        "method": section.method,
        "rates": {f"{rate:g}": loss for rate, loss in sorted(rates.items())},
        "chosen": chosen,
        "words": words,
    }


def _method(section: ControlSection) -> str:
    if section.method == "full":
        return "full fine-tuning"
    return f"an adapter of rank {section.rank} over the adapters' own base, in place of full fine-tuning,"


def _search(rates: Mapping[float, float], chosen: float) -> str:
    """Say how the rate was found, and whether a better one may lie beyond those tried."""
    if len(rates) < 2:
        return ", the only one tried"
    others = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in sorted(rates.items()) if rate != chosen)
    found = f", the best of {len(rates)} by the loss on examples kept for that ({rates[chosen]:.3f}; {others})"
    end = "lowest" if chosen == min(rates) else "highest" if chosen == max(rates) else None
    return found + (f"; it is the {end} tried, and a better one may lie beyond" if end else "")
