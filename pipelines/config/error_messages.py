"""Error messages for a recipe, one sentence per problem: the value, the rule and the fix."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipelines.config.other_names import KEY_OF, NOTES, REASON_OF

Location = tuple[str | int, ...]
KEY_MARK = "[key]"
"""Last part of the location of a problem with the key of a mapping."""
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
    location = problem["loc"]
    key = ".".join(str(part) for part in location if part != KEY_MARK) or "recipe"
    message: str = problem["msg"].removeprefix("Value error, ")
    lowered = message[:1].lower() + message[1:]
    if key in RENAMED:
        return f"unknown key {key!r}; it is now called {RENAMED[key]!r}"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_hint(location, root)}"
    if location[-1:] == (KEY_MARK,):
        return f"unknown key {key!r}; {lowered}"
    if problem["type"] == "missing":
        return f"{key} is missing; add it"
    if problem["type"] == "value_error":
        return message if key == "recipe" else f"{key} {message}"
    return f"{key} = {problem['input']!r}: {_rule(key, problem, lowered)}"


def _rule(key: str, problem: Any, message: str) -> str:
    """Return what is wrong with a value; types have the names that YAML gives them."""
    value = problem["input"]
    if problem["type"] == "tuple_type":
        return f"input should be a list, such as [{value}]"
    if problem["type"] != "model_type":
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
    parents = location[:-1]
    here = _section_at(parents, root).model_fields
    local = [name for name in _last_parts(key) if name in here and parents]
    note = f" ({NOTES[key]})" if key in NOTES else ""
    if local:
        key = " or ".join(".".join(map(str, [*parents, name])) for name in local)
    return f"use {key}{note}"


def _last_parts(keys: str) -> list[str]:
    return [key.rpartition(".")[2] for key in keys.split(" or ")]


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
