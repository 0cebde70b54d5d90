"""What is wrong with a recipe, a sentence for each problem: the value, the rule, and what to write instead."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

RENAMED = {
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.checkpoint_share": "training.checkpoint_time_fraction",
}
"""Former keys, and what they are called now."""


def sentences(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return a sentence for each problem of a recipe, whose sections are the fields of `root`."""
    return [_sentence(problem, root) for problem in _causes(error.errors())]


def _causes(problems: Sequence[Any]) -> list[Any]:
    """Leave out that a list is too short where it is so only because an item in it was refused."""
    places = [problem["loc"] for problem in problems]
    refused_inside = {place[:end] for place in places for end in range(len(place))}
    return [
        problem
        for problem in problems
        if problem["type"] != "too_short" or problem["loc"] not in refused_inside
    ]


def _sentence(problem: Any, root: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if place in RENAMED:
        return f"unknown key {place!r}; it is now called {RENAMED[place]!r}"
    if problem["type"] == "extra_forbidden":
        known = _fields_beside(problem["loc"], root)
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        return f"unknown key {place!r}; " + (
            f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"{place} is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if place == "recipe" else f"{place} {message}"
    return f"{place} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_beside(location: tuple[str | int, ...], root: type[BaseModel]) -> list[str]:
    """Return the keys that may stand where an unknown one stood."""
    section = root
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        section = annotation
    return sorted(section.model_fields)
