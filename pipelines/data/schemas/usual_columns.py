"""Columns of a source: what each is, by the recipe's mapping or by its usual name.

A row is a text, a list of messages, or a pair of prompt and completion; each kind has columns that
it requires, and others that it can have.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import yaml

from pipelines.config.data_section import ColumnName
from pipelines.data.schemas.messages import is_message_list
from pipelines.errors import DataError

Kind = Literal["text", "messages", "pair"]
Columns = Mapping[ColumnName, str]
"""What a column is → its name in the source."""

USUAL_COLUMNS: dict[ColumnName, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
    "prompt": ("prompt", "instruction", "question", "query", "problem", "input"),
    "completion": ("completion", "response", "output", "answer", "solution"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "input": ("input", "context"),
}
"""What a column is → its usual names; capital letters make no difference."""
REQUIRED: dict[Kind, tuple[ColumnName, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "pair": ("prompt", "completion"),
}
OPTIONAL: dict[Kind, tuple[ColumnName, ...]] = {
    "text": (),
    "messages": ("system", "tools"),
    "pair": ("input", "system", "history", "tools"),
}
_WRITTEN_LIST = re.compile(r"""\s*\[\s*\{.{0,300}?["'](role|from)["']\s*:""", re.DOTALL)
INSTRUCTION = "instruction"
"""Name of a prompt that an input can follow."""


@dataclass(frozen=True)
class RowLayout:
    """One way to read the rows of a source."""

    kind: Kind
    columns: Columns

    def __str__(self) -> str:
        return as_yaml(self.columns)


def as_yaml(columns: Mapping[Any, str]) -> str:
    """Return a mapping on one line as a recipe has it, such as `{prompt: question}`."""
    text: str = yaml.safe_dump(
        dict(columns), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
    )
    return text.strip()


def check_mapping(mapping: Columns, columns: Sequence[str]) -> None:
    """Refuse a mapping that names a missing column, or columns that cannot be read together.

    Args:
        mapping: data.columns of the recipe.
        columns: of the source.

    Raises:
        DataError: a column is missing or named twice, or the meanings cannot be in one row.
    """
    for name, column in mapping.items():
        if column not in columns:
            raise DataError(
                f"has the columns {quoted(columns)}, and data.columns names {column!r} as the "
                f"{name}; name one of them"
            )
    if len(set(mapping.values())) < len(mapping):
        raise DataError(
            f"has data.columns {as_yaml(mapping)}, which names a column twice; a column has one "
            "meaning; remove one of them"
        )
    if not any(_fits(kind, mapping) for kind in REQUIRED):
        kinds = "; ".join(", ".join(REQUIRED[kind] + OPTIONAL[kind]) for kind in REQUIRED)
        raise DataError(
            f"has data.columns {as_yaml(mapping)}, which cannot be read together; a row has columns"
            f" of one of these groups: {kinds}; remove the others"
        )


def possible_layouts(
    columns: Sequence[str], mapping: Columns, sample: Sequence[Mapping[str, Any]]
) -> list[RowLayout]:
    """Return every way to read the rows.

    Args:
        columns: of the source.
        mapping: of the recipe; it precedes the usual names.
        sample: the first rows, to recognize a column of messages.
    """
    return [
        RowLayout(kind, {**required, **_optional_columns(kind, columns, {**mapping, **required})})
        for kind in REQUIRED
        if _fits(kind, mapping)
        for required in _required_columns(kind, columns, mapping, sample)
    ]


def find_columns(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the columns with these names; of one name, those in other case only if needed.

    Args:
        names: usual names in small letters, the most usual first.
        columns: of the source.
    """
    found: list[str] = []
    for name in names:
        if name in columns:
            found.append(name)
        else:
            found += [column for column in columns if column.lower() == name]
    return found


def quoted(columns: Sequence[str]) -> str:
    """Return a list of column names for a message."""
    return ", ".join(repr(column) for column in columns)


def _fits(kind: Kind, mapping: Columns) -> bool:
    return set(mapping) <= {*REQUIRED[kind], *OPTIONAL[kind]}


def _required_columns(
    kind: Kind, columns: Sequence[str], mapping: Columns, sample: Sequence[Mapping[str, Any]]
) -> Iterator[dict[ColumnName, str]]:
    """Yield the columns for what a kind requires, in every combination."""
    names = REQUIRED[kind]
    choices = [
        [mapping[name]] if name in mapping else _candidates(name, columns, mapping, sample)
        for name in names
    ]
    for chosen in product(*choices):
        yield dict(zip(names, chosen, strict=True))


def _candidates(
    name: ColumnName,
    columns: Sequence[str],
    mapping: Columns,
    sample: Sequence[Mapping[str, Any]],
) -> list[str]:
    unmapped = [column for column in columns if column not in mapping.values()]
    found = find_columns(USUAL_COLUMNS[name], unmapped)
    if name == "messages":
        return [column for column in found if _has_messages(column, sample)]
    if name == "prompt" and any(column.lower() == INSTRUCTION for column in found):
        return [column for column in found if column.lower() != "input"]
    return found


def _optional_columns(kind: Kind, columns: Sequence[str], taken: Columns) -> dict[ColumnName, str]:
    """Return the columns for what a kind can have: as mapped, or with a usual name."""
    chosen: dict[ColumnName, str] = {}
    unused = [column for column in columns if column not in taken.values()]
    for name in OPTIONAL[kind]:
        found = find_columns(USUAL_COLUMNS[name], unused)
        if name in taken:
            chosen[name] = taken[name]
        elif name == "input" and taken["prompt"].lower() != INSTRUCTION:
            continue
        elif len(found) > 1:
            raise DataError(
                f"has the columns {quoted(found)}, of which one can be the {name}; name it in "
                f"data.columns, such as {as_yaml({name: found[0]})}"
            )
        elif found:
            chosen[name] = found[0]
    return chosen


def _has_messages(column: str, sample: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a column has messages; one called messages always counts."""
    return column.lower() == "messages" or any(
        is_message_list(row.get(column)) or is_written_list(row.get(column)) for row in sample
    )


def is_written_list(value: Any) -> bool:
    """Return whether a text is a list of messages as JSON, or as Python prints one."""
    return isinstance(value, str) and _WRITTEN_LIST.match(value) is not None
