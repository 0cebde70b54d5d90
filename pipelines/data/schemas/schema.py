"""How the rows of a source are read, and the reading of one row.

| module | content |
|---|---|
| `usual_columns` | which columns a source has, by mapping or by usual name |
| `refused_columns` | columns that are refused instead of being ignored |
| `messages`, `roles`, `tool_calls`, `content` | one list of messages |
| `pairs` | a prompt and a completion |
| `supervision` | which turns are learned |
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from pipelines.config.data_section import ColumnName, WeightedSource
from pipelines.data.conversation import Conversation, ParsedRow, PlainText
from pipelines.data.schemas.content import read_text
from pipelines.data.schemas.messages import MessageRules, is_message_list, read_turns
from pipelines.data.schemas.pairs import read_pair, with_system
from pipelines.data.schemas.refused_columns import ColumnCheck, column_checks, refuse_unreadable
from pipelines.data.schemas.supervision import first_question, supervise_turns
from pipelines.data.schemas.tool_calls import read_tools
from pipelines.data.schemas.usual_columns import (
    REQUIRED,
    Columns,
    Kind,
    RowLayout,
    as_yaml,
    check_mapping,
    is_written_list,
    possible_layouts,
    quoted,
)
from pipelines.errors import DataError

SAMPLE_ROWS = 100
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Schema:
    """How the rows of a source are read."""

    name: str
    """For people, such as `messages`, `sharegpt`, `alpaca` or `question/answer`."""
    kind: Kind
    columns: Mapping[ColumnName, str]
    """What a column is → its name in the source."""
    used: tuple[str, ...]
    """Columns of the source that are read, including the column of groups."""
    unused: tuple[str, ...]
    """The other columns of the source."""
    rules: MessageRules
    """How messages are read."""
    checks: tuple[ColumnCheck, ...] = ()
    """Columns that must be harmless in every row."""

    def parse(self, row: Row) -> ParsedRow:
        """Return what a row contains.

        Raises:
            DataError: the row cannot be read exactly as it is meant; the message does not name it.
        """
        for check in self.checks:
            check.check(row)
        values = {name: row.get(column) for name, column in self.columns.items()}
        if self.kind == "text":
            return PlainText(read_text(values["text"], "its text"))
        if self.kind == "pair":
            return read_pair(values, self.rules)
        return self._read_messages(values)

    def _read_messages(self, values: Mapping[ColumnName, Any]) -> Conversation:
        turns = read_turns(values["messages"], "its messages", self.rules)
        turns = with_system(turns, values.get("system"))
        start = first_question(turns)
        messages = supervise_turns(turns, start=start, supervise=self.rules.supervise)
        return Conversation(messages, read_tools(values.get("tools")))


def detect_schema(
    columns: Sequence[str],
    rows: Iterable[Row],
    settings: WeightedSource,
    *,
    supervise: Literal["assistant", "last", "all"],
    group_column: str | None,
) -> Schema:
    """Return how to read the rows of a source.

    Args:
        columns: of the source.
        rows: its first rows.
        settings: its source, columns and roles.
        supervise: which turns are learned.
        group_column: a column that is used in addition.

    Raises:
        DataError: the columns cannot be read, or can be read in several ways.
    """
    sample = list(islice(rows, SAMPLE_ROWS))
    left_out = _left_out(columns, settings.columns, group_column)
    try:
        _check_group_column(group_column, columns)
        layout = _choose_layout(columns, sample, settings.columns, left_out)
        _check_roles(settings, layout, sample)
        checks = _checks(columns, sample, layout, left_out)
    except DataError as error:
        raise DataError(f"data source {settings.source!r} {error}") from error
    read = {*layout.columns.values(), group_column}
    return Schema(
        name=_name(layout, sample),
        kind=layout.kind,
        columns=layout.columns,
        used=tuple(column for column in columns if column in read),
        unused=tuple(column for column in columns if column not in read),
        rules=MessageRules(settings.roles, supervise),
        checks=checks,
    )


def _left_out(columns: Sequence[str], mapping: Columns, group_column: str | None) -> set[str]:
    """Return the columns that the recipe leaves out knowingly.

    They are all others if it names every column that some kind of row requires.
    """
    is_complete = any(set(names) <= set(mapping) for names in REQUIRED.values())
    if is_complete:
        return set(columns)
    return {column for column in columns if column == group_column}


def _choose_layout(
    columns: Sequence[str], sample: Sequence[Row], mapping: Columns, left_out: set[str]
) -> RowLayout:
    check_mapping(mapping, columns)
    layouts = possible_layouts(columns, mapping, sample)
    known = {*mapping.values(), *left_out}
    refuse_unreadable([column for column in columns if column not in known], sample)
    if not layouts:
        example = as_yaml({"prompt": "question", "completion": "answer"})
        raise DataError(
            f"has the columns {quoted(columns)}; rows have text, prompt and completion, or "
            f"messages; name yours in data.columns, such as {example}"
        )
    if len(layouts) > 1:
        ways = " or ".join(str(layout) for layout in layouts)
        raise DataError(
            f"has the columns {quoted(columns)}, which can be read in {len(layouts)} ways; choose "
            f"one of them: set data.columns: {ways}"
        )
    _refuse_written_messages(layouts[0], sample)
    return layouts[0]


def _checks(
    columns: Sequence[str], sample: Sequence[Row], layout: RowLayout, left_out: set[str]
) -> tuple[ColumnCheck, ...]:
    """Return the checks of every row; those that concern a complete column are made here."""
    others = [column for column in columns if column not in layout.columns.values()]
    checks = column_checks(others, layout, sample, left_out=left_out)
    for check in checks:
        if check.refusal.can_be_mapped:
            for row in sample:
                check.check(row)
    return checks


def _refuse_written_messages(layout: RowLayout, sample: Sequence[Row]) -> None:
    """Refuse prompts that are lists of messages written as text: they would be read as text."""
    column = layout.columns.get("prompt")
    if column is None or not sample:
        return
    if all(is_written_list(row.get(column)) for row in sample):
        raise DataError(
            f"has lists of messages that are written as text in the column {column!r}; a prompt "
            "is a text or a list; write lists, or one column messages, which can be JSON text"
        )


def _check_group_column(name: str | None, columns: Sequence[str]) -> None:
    if name is not None and name not in columns:
        raise DataError(
            f"has the columns {quoted(columns)}, and data.group_column names {name!r}; name one of "
            "them or remove data.group_column"
        )


def _check_roles(settings: WeightedSource, layout: RowLayout, sample: Sequence[Row]) -> None:
    """Refuse roles for rows without messages."""
    if not settings.roles or layout.kind == "messages":
        return
    names = layout.columns.values()
    if not any(_may_have_messages(row.get(name)) for row in sample for name in names):
        raise DataError(
            f"has data.roles {as_yaml(settings.roles)}, which have no effect: rows with "
            f"{layout} have no messages; remove data.roles"
        )


def _may_have_messages(value: Any) -> bool:
    return is_message_list(value) or is_written_list(value)


def _name(layout: RowLayout, sample: Sequence[Row]) -> str:
    columns = layout.columns
    if layout.kind == "text":
        return "text"
    if layout.kind == "messages":
        column = columns["messages"]
        is_sharegpt = any(_has_sharegpt_keys(row.get(column)) for row in sample)
        return "sharegpt" if is_sharegpt else "messages"
    prompt = columns["prompt"]
    completion = columns["completion"]
    if prompt.lower() == "instruction" and completion.lower() == "output":
        return "alpaca"
    name = f"{prompt}/{completion}"
    is_conversational = any(is_message_list(row.get(prompt)) for row in sample)
    return f"conversational {name}" if is_conversational else name


def _has_sharegpt_keys(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(item, dict) and "from" in item for item in value
    )
