"""Rows with a prompt and a completion, each a text or a list of messages.

The prompt of a text pair can have an input, which follows it on a new line (Taori et al. 2023,
Stanford Alpaca), and earlier questions and answers in a history.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as truncated
from typing import Any

from pipelines.config.data_section import ColumnName
from pipelines.data.conversation import Conversation
from pipelines.data.schemas.content import is_blank, read_json, read_optional_text, read_text
from pipelines.data.schemas.messages import MessageRules, Turn, is_message_list, read_turns
from pipelines.data.schemas.supervision import supervise_turns
from pipelines.data.schemas.tool_calls import read_tools
from pipelines.errors import DataError

Row = Mapping[ColumnName, Any]
"""What a column is → its value in a row."""


@dataclass(frozen=True)
class _PairCells:
    """The cells of a row with a prompt and a completion; those of missing columns are None."""

    prompt: Any
    completion: Any
    input: Any
    history: Any

    @classmethod
    def of(cls, row: Row) -> "_PairCells":
        return cls(row["prompt"], row["completion"], row.get("input"), row.get("history"))


def read_pair(row: Row, rules: MessageRules) -> Conversation:
    """Return the conversation of a row with a prompt and a completion.

    Args:
        row: has a prompt and a completion; the other columns are optional.
        rules: how messages are read, and which turns are learned.

    Raises:
        DataError: a value cannot be read exactly as it is meant.
    """
    cells = _PairCells.of(row)
    has_prompt_list = is_message_list(cells.prompt)
    has_completion_list = is_message_list(cells.completion)
    if has_prompt_list:
        prompt = _read_prompt_list(cells, rules)
    else:
        earlier = _read_history(cells.history, rules)
        prompt = [*earlier, _read_prompt(cells)]
    if has_completion_list:
        completion = _read_completion_list(cells.completion, rules)
    else:
        text = read_text(cells.completion, "its completion")
        completion = [Turn("assistant", text, {})]
    turns = with_system(prompt, row.get("system"))
    start = 0
    if has_prompt_list:
        start = len(turns)
    messages = supervise_turns(turns + completion, start=start, supervise=rules.supervise)
    tools = read_tools(row.get("tools"))
    is_text = not (has_prompt_list or has_completion_list)
    is_pair = is_text and len(turns) == 1 and tools is None
    return Conversation(messages, tools, is_pair)


def with_system(turns: list[Turn], value: Any) -> list[Turn]:
    """Return the turns after the system turn of a column; without text, it is absent.

    Args:
        turns: of a conversation or a prompt.
        value: of the column with the system message.

    Raises:
        DataError: the turns start with a different system turn.
    """
    text = read_optional_text(value, "its system")
    if not text:
        return turns
    if turns and turns[0].role == "system":
        if turns[0].content != text:
            raise DataError(
                f"has {truncated(text)} as its system and {truncated(turns[0].content)} as its "
                "first message of role 'system'; only one can start a conversation; remove the "
                "other"
            )
        return turns
    return [Turn("system", text, {}), *turns]


def _read_prompt(cells: _PairCells) -> Turn:
    """Return the question of a text pair, which is the prompt and its input."""
    addition = read_optional_text(cells.input, "its input")
    if not addition:
        return Turn("user", read_text(cells.prompt, "its prompt"), {})
    prompt = read_optional_text(cells.prompt, "its prompt")
    text = f"{prompt}\n{addition}" if prompt else addition
    return Turn("user", text, {})


def _read_prompt_list(cells: _PairCells, rules: MessageRules) -> list[Turn]:
    for name, value in (("input", cells.input), ("history", cells.history)):
        if not is_blank(value):
            raise DataError(
                f"has {truncated(value)} as its {name} and a prompt of messages, which has "
                "none; move it into the prompt or remove the row"
            )
    return read_turns(cells.prompt, "its prompt", rules)


def _read_completion_list(value: Any, rules: MessageRules) -> list[Turn]:
    turns = read_turns(value, "its completion", rules)
    if turns[0].role in ("user", "system"):
        raise DataError(
            f"has a completion that starts with a message of role {turns[0].role!r}; it continues "
            "the prompt, so it must start with an answer; fix it, or map it as messages in "
            "data.columns"
        )
    if all(turn.role != "assistant" for turn in turns):
        raise DataError(
            "has no message of role 'assistant' in its completion, so it has nothing to learn "
            "from; add an answer or remove the row"
        )
    return turns


def _read_history(value: Any, rules: MessageRules) -> list[Turn]:
    """Return earlier turns, written as pairs of question and answer or as messages."""
    if is_blank(value):
        return []
    items = value
    if isinstance(value, str):
        items = read_json(value, "its history")
    if is_message_list(items):
        return read_turns(items, "its history", rules)
    if not isinstance(items, list):
        raise DataError(
            f"has {truncated(value)} as its history, which must be a list of pairs of question and "
            "answer; fix it or remove the row"
        )
    turns: list[Turn] = []
    for number, item in enumerate(items, start=1):
        turns += _read_exchange(item, f"pair {number} of its history")
    return turns


def _read_exchange(item: Any, what: str) -> list[Turn]:
    if not isinstance(item, list) or len(item) != 2:
        raise DataError(
            f"has {truncated(item)} as {what}, which must be a question and an answer; fix it or "
            "remove the row"
        )
    question = read_text(item[0], f"the question in {what}")
    answer = read_text(item[1], f"the answer in {what}")
    return [Turn("user", question, {}), Turn("assistant", answer, {})]
