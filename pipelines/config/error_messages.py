"""Error messages for a recipe, one sentence per problem: the value, the rule and the fix."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

RENAMED = {
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.checkpoint_share": "training.checkpoint_time_fraction",
}
"""Former keys → their new names."""


def sentences(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return a sentence for each problem of a recipe, whose sections are the fields of `root`."""
    return [_sentence(problem, root) for problem in _causes(error.errors())]


def _causes(problems: Sequence[Any]) -> list[Any]:
    """Drop "list too short" problems that are only a consequence of a rejected item in the list."""
    parents = set()
    for problem in problems:
        location = problem["loc"]
        parents |= {location[:end] for end in range(len(location))}
    causes = []
    for problem in problems:
        if problem["type"] != "too_short" or problem["loc"] not in parents:
            causes.append(problem)
    return causes


def _sentence(problem: Any, root: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if key in RENAMED:
        return f"unknown key {key!r}; it is now called {RENAMED[key]!r}"
    if problem["type"] == "extra_forbidden":
        known = _sibling_keys(problem["loc"], root)
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{key} is missing; add it"
    message: str = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if key == "recipe" else f"{key} {message}"
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _sibling_keys(location: tuple[str | int, ...], root: type[BaseModel]) -> list[str]:
    """Return the keys that are allowed in the section of an unknown key."""
    section = root
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        section = annotation
    return sorted(section.model_fields)
