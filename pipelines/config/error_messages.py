"""Error messages for a recipe, one sentence per problem: the value, the rule and the fix."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipelines.config.other_names import KEY_OF, NOTES, REASON_OF

Location = tuple[str | int, ...]
KEY_MARK = "[key]"
"""Last part of the location of a problem with the key of a mapping."""
MAX_SHOWN = 120
"""Characters of a value that a message shows."""
MAIN_KEYS = {
    "base_model": "base_model.id",
    "data": "data.source",
    "lora": "lora.ranks",
    "registry": "registry.model",
}
"""Section → the key that is meant if the section is a text."""
RENAMED = {
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.checkpoint_share": "training.checkpoint_time_fraction",
}
"""Former keys → their new names."""


@dataclass(frozen=True)
class ValidationProblem:
    """One problem that pydantic has found."""

    kind: str
    """Pydantic's name of it, such as extra_forbidden."""
    location: Location
    message: str
    value: Any
    """What was to be validated."""

    @property
    def key(self) -> str:
        """The key as a recipe names it, with a dot between sections; empty at the top level."""
        return ".".join(str(part) for part in self.location if part != KEY_MARK)


def problems_of(error: ValidationError) -> list[ValidationProblem]:
    """Return the problems of a validation, in the order of the fields."""
    problems = []
    for details in error.errors(include_url=False):
        problem = ValidationProblem(
            kind=details["type"],
            location=details["loc"],
            message=details["msg"],
            value=details["input"],
        )
        problems.append(problem)
    return problems


def sentences(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return a sentence for each problem of a recipe.

    Args:
        error: of the validation of a recipe.
        root: the model of a recipe, whose fields are its sections.
    """
    return [_sentence(problem, root) for problem in _causes(problems_of(error))]


def _causes(problems: Sequence[ValidationProblem]) -> list[ValidationProblem]:
    """Drop "list too short" problems that are only a consequence of a rejected item in the list."""
    parents = set[Location]()
    for problem in problems:
        location = problem.location
        parents |= {location[:end] for end in range(len(location))}
    causes = []
    for problem in problems:
        if problem.kind != "too_short" or problem.location not in parents:
            causes.append(problem)
    return causes


def _sentence(problem: ValidationProblem, root: type[BaseModel]) -> str:
    key = problem.key or "recipe"
    message = problem.message.removeprefix("Value error, ")
    lowered = message[:1].lower() + message[1:]
    if key in RENAMED:
        return f"unknown key {key!r}; it is now called {RENAMED[key]!r}"
    if problem.kind == "extra_forbidden":
        return f"unknown key {key!r}; {_hint(problem.location, root)}"
    if problem.location[-1:] == (KEY_MARK,):
        return f"unknown key {key!r}; {lowered}"
    if problem.kind == "missing":
        return f"{key} is missing; add it"
    if problem.kind == "value_error":
        return message if key == "recipe" else f"{key} {message}"
    shown = repr(problem.value)
    if len(shown) > MAX_SHOWN:
        shown = f"{shown[:MAX_SHOWN]}…"
    return f"{key} = {shown}: {_rule(key, problem, lowered)}"


def _rule(key: str, problem: ValidationProblem, message: str) -> str:
    """Return what is wrong with a value; types have the names that YAML gives them."""
    value = problem.value
    if problem.kind == "tuple_type":
        return f"input should be a list, such as [{value}]"
    if problem.kind != "model_type":
        return message
    if isinstance(value, str) and key in MAIN_KEYS:
        return f"input should be a valid dictionary; use {MAIN_KEYS[key]}"
    if isinstance(value, str) and key.startswith("data.sources."):
        return f"input should be a valid dictionary, such as {{source: {value}}}"
    if isinstance(value, list) and key == "data":
        return "input should be a valid dictionary; write the list under data.sources"
    return "input should be a valid dictionary"


def _hint(location: Location, root: type[BaseModel]) -> str:
    """Return what to write instead of an unknown key."""
    name = str(location[-1])
    common_name = name.lower().replace("-", "_")
    if common_name in REASON_OF:
        return REASON_OF[common_name]
    if common_name in KEY_OF:
        return _use(KEY_OF[common_name], location, root)
    elsewhere = _keys_called(name, root)
    if elsewhere:
        return f"use {' or '.join(elsewhere)}"
    known = sorted(_section_at(location[:-1], root).model_fields)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known here: {', '.join(known)}"


def _use(key: str, location: Location, root: type[BaseModel]) -> str:
    """Return the advice to use a key; that of the same section if it has a key of that name."""
    note = f" ({NOTES[key]})" if key in NOTES else ""
    local = _keys_in_same_section(key, location[:-1], root)
    advised = " or ".join(local) or key
    return f"use {advised}{note}"


def _keys_in_same_section(keys: str, parents: Location, root: type[BaseModel]) -> list[str]:
    """Return those of several keys that the section at `parents` has under the same last name."""
    if not parents:
        return []
    here = _section_at(parents, root).model_fields
    prefix = ".".join(map(str, parents))
    local = []
    for key in keys.split(" or "):
        name = key.rpartition(".")[2]
        if name in here:
            local.append(f"{prefix}.{name}")
    return local


def _keys_called(name: str, section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the keys with a name, in a section and in the sections inside it."""
    keys = []
    for key, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if key == name:
            keys.append(f"{prefix}{key}")
        elif inner is not None and not _is_list(field.annotation):
            keys += _keys_called(name, inner, f"{prefix}{key}.")
    return keys


def _section_at(location: Location, root: type[BaseModel]) -> type[BaseModel]:
    """Return the section at a location; an index leads to an item of a list."""
    section = root
    for part in location:
        if isinstance(part, int):
            continue
        inner = _section_of(section.model_fields[part].annotation)
        assert inner is not None, location
        section = inner
    return section


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation contains, such as `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = [_section_of(argument) for argument in get_args(annotation)]
    return next((section for section in sections if section is not None), None)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple)
