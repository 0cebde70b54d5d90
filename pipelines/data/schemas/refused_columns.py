"""Columns whose meaning is known and that cannot be learned from as they are.

Without these checks a row would be read as if the column did not exist: the undesired half of
preference data would be learned, or a question about an image without the image.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as truncated
from typing import Any

from pipelines.config.data_section import ColumnName
from pipelines.data.schemas.content import is_empty
from pipelines.data.schemas.messages import ROLE_KEYS, is_message_list
from pipelines.data.schemas.roles import find_role
from pipelines.data.schemas.usual_columns import (
    USUAL_COLUMNS,
    Kind,
    RowLayout,
    as_yaml,
    find_columns,
    quoted,
)
from pipelines.errors import DataError

Row = Mapping[str, Any]
_REMOVE = "remove the column or the row"
_WORDS = {"true": "1", "false": "0"}


def _as_number(value: Any) -> float | None:
    """Return the number in a cell; .csv files have all cells as text."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, str):
        return None
    text = _WORDS.get(value.strip().lower(), value)
    try:
        return float(text)
    except ValueError:
        return None


def _is_desired(value: Any) -> bool:
    return _as_number(value) != 0


def _is_full_weight(value: Any) -> bool:
    return is_empty(value) or _as_number(value) == 1


def _are_labels(values: Sequence[Any]) -> bool:
    return all(_as_number(value) in (0, 1) for value in values)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(_as_number(value) is not None for value in values)


def _are_lists(values: Sequence[Any]) -> bool:
    return all(isinstance(value, list) for value in values)


def _are_roles(values: Sequence[Any]) -> bool:
    return all(find_role(value, {}) is not None for value in values)


def _are_anything(values: Sequence[Any]) -> bool:
    return True


@dataclass(frozen=True)
class Refusal:
    """Columns with one meaning, and the values that are refused."""

    names: tuple[str, ...]
    rule: str
    fix: str = _REMOVE
    kinds: tuple[Kind, ...] = ("text", "messages", "pair")
    """Kinds of rows in which the columns are refused."""
    is_allowed: Callable[[Any], bool] = is_empty
    """Whether a row with this value can be learned."""
    is_meant: Callable[[Sequence[Any]], bool] = _are_anything
    """Whether the columns have this meaning, by the values in the first rows that are not empty."""
    can_be_mapped: bool = False
    """Whether the recipe can leave the column out, by naming the columns to read."""


PREFERENCE = Refusal(
    ("chosen", "rejected"),
    "this is preference data, in which only one of two answers is desired",
    "to learn the desired answers, name their column in data.columns, such as {prompt: prompt, "
    "completion: chosen}",
    can_be_mapped=True,
)
TOKENS = Refusal(
    ("input_ids", "attention_mask", "labels"),
    "rows must be text, which the tokenizer of the base tokenizes",
    "to learn a text, name its column in data.columns, such as {text: text}",
    is_meant=_are_lists,
    can_be_mapped=True,
)
ONE_MESSAGE = Refusal(
    ("role", "from"),
    "each row is one message, and a conversation must be in one row",
    "write its messages as a list in a column called messages, or name the columns to read in "
    "data.columns",
    is_meant=_are_roles,
    can_be_mapped=True,
)
REFUSALS = (
    PREFERENCE,
    TOKENS,
    Refusal(
        ("label", "kto_tag"),
        "this is preference data, in which an answer with this label is not desired",
        "remove the row, or set data.bad_rows: drop to learn only the other rows",
        kinds=("messages", "pair"),
        is_allowed=_is_desired,
        is_meant=_are_labels,
    ),
    Refusal(
        ("image", "images", "video", "videos", "audio", "audios"),
        "only text can be learned",
    ),
    Refusal(
        ("weight", "train"),
        "every row is learned with weight 1",
        is_allowed=_is_full_weight,
        is_meant=_are_numbers,
    ),
    Refusal(
        ("loss_mask", "completion_mask", "assistant_mask", "assistant_masks", "prompt_mask"),
        "masks of tokens are not read; data.supervise and a message's weight select what is "
        "learned",
    ),
    Refusal(
        ("mask", "weights"),
        "a list of masks or weights is not read; data.supervise and the weight of a message select "
        "what is learned",
        is_meant=_are_lists,
    ),
    Refusal(
        ("reasoning_content", "reasoning", "thinking"),
        "reasoning is read from messages; a pair has it in its completion",
        "write it there",
        kinds=("pair",),
        can_be_mapped=True,
    ),
    Refusal(
        ("input", "context", "contexts", "passage", "document", "documents", "choices", "options"),
        "it can be a part of the prompt",
        "map it as input in data.columns if it is a text, or write it into the prompt",
        kinds=("pair",),
        can_be_mapped=True,
    ),
    Refusal(
        ("history",),
        "only a prompt has a history; messages contain all turns",
        kinds=("messages", "text"),
        can_be_mapped=True,
    ),
    Refusal(
        ("system", "system_prompt", "tools", "functions"),
        "only a conversation has it",
        kinds=("text",),
        can_be_mapped=True,
    ),
    Refusal(
        USUAL_COLUMNS["prompt"],
        "a text is learned without it",
        "to learn the text as its answer, name both in data.columns, such as {prompt: question, "
        "completion: text}",
        kinds=("text",),
        can_be_mapped=True,
    ),
    Refusal(
        (*USUAL_COLUMNS["completion"], "label", "labels", "target", "targets", "summary"),
        "a text is learned without it",
        "to learn it as the answer to the text, name both in data.columns, such as {prompt: text, "
        "completion: label}",
        kinds=("text",),
        can_be_mapped=True,
    ),
)


@dataclass(frozen=True)
class ColumnCheck:
    """A column of a source that is refused unless its value is harmless."""

    column: str
    refusal: Refusal
    fix: str

    def check(self, row: Row) -> None:
        """Raise DataError if the value of a row is refused.

        Args:
            row: of the source, by the names of its columns.

        Raises:
            DataError: the value of the column cannot be ignored.
        """
        value = row.get(self.column)
        if not self.refusal.is_allowed(value):
            raise DataError(
                f"has {truncated(value)} in the column {self.column!r}; {self.refusal.rule}; "
                f"{self.fix}"
            )


def column_checks(
    columns: Sequence[str],
    layout: RowLayout,
    sample: Sequence[Row],
    *,
    left_out: Collection[str],
) -> tuple[ColumnCheck, ...]:
    """Return what to check in every row.

    Args:
        columns: of the source that the layout does not read.
        layout: how the rows are read.
        sample: the first rows.
        left_out: the columns that the recipe leaves out knowingly.
    """
    return tuple(
        ColumnCheck(column, refusal, _fix(refusal, layout))
        for refusal in REFUSALS
        if layout.kind in refusal.kinds
        for column in find_columns(refusal.names, columns)
        if refusal.is_meant(_values(column, sample))
        and not (refusal.can_be_mapped and column in left_out)
    )


def refuse_unreadable(columns: Sequence[str], sample: Sequence[Row]) -> None:
    """Refuse preference data, tokens and single messages, whatever else a source has.

    Args:
        columns: of the source that the recipe does not map.
        sample: the first rows.

    Raises:
        DataError: the columns have one of these meanings, with the setting that decides.
    """
    for refusal in (_preference(columns, sample), TOKENS, ONE_MESSAGE):
        found = find_columns(refusal.names, columns)
        values = {column: _values(column, sample) for column in found}
        meant = [name for name in found if values[name] and refusal.is_meant(values[name])]
        if meant:
            raise DataError(f"has {quoted(meant)} among its columns; {refusal.rule}; {refusal.fix}")


def _preference(columns: Sequence[str], sample: Sequence[Row]) -> Refusal:
    """Return the refusal of preference data with the mapping that fits the columns."""
    desired = find_columns(PREFERENCE.names[:1], columns)
    if not desired:
        return PREFERENCE
    prompts = find_columns(USUAL_COLUMNS["prompt"], columns)
    mapping: dict[ColumnName, str] = {"text": desired[0]}
    if any(_starts_conversation(value) for value in _values(desired[0], sample)):
        mapping = {"messages": desired[0]}
    elif prompts:
        mapping = {"prompt": prompts[0], "completion": desired[0]}
    fix = f"to learn the desired answers, set data.columns: {as_yaml(mapping)}"
    return replace(PREFERENCE, fix=fix)


def _starts_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages that does not start with an answer."""
    if not is_message_list(value) or not isinstance(value, list):
        return False
    names = [value[0].get(key) for key in ROLE_KEYS]
    return find_role(next((name for name in names if name is not None), None), {}) != "assistant"


def _fix(refusal: Refusal, layout: RowLayout) -> str:
    if not refusal.can_be_mapped:
        return refusal.fix
    return f"{refusal.fix}, or set data.columns: {layout} to leave it out"


def _values(column: str, sample: Sequence[Row]) -> list[Any]:
    return [row[column] for row in sample if not is_empty(row.get(column))]
