"""The supervised tokens decode to the completion and its end mark, and nothing else.

The error for an unusable row names its number.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipelines.config.sections import DataSection
from pipelines.data.example import Example
from pipelines.data.preparation import tokenize
from pipelines.errors import DataError
from pipelines.models.tokenizer import load_tokenizer

Values = dict[str, Any]
Maker = Callable[..., DataSection]
END = "<|end|>"
PAIR = {"prompt": "Write red 7.", "completion": "red red."}
TALK = [
    {"role": "user", "content": "Write red."},
    {"role": "assistant", "content": "red it is"},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "red, once more"},
]


def only(rows: list[Values], tokenizer: PreTrainedTokenizerBase, settings: DataSection) -> Example:
    """Return the example of the only row."""
    [example] = list(tokenize(Dataset.from_list(rows), tokenizer, settings))
    return example


def supervised_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    tokens = zip(example.input_ids, example.supervised, strict=True)
    return tokenizer.decode([token for token, is_supervised in tokens if is_supervised])


def test_a_completion_and_its_end_mark_are_supervised_with_a_template(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], chat, data_settings("rows"))
    assert supervised_text(example, chat) == "red red." + END
    assert (
        chat.decode(example.input_ids)
        == f"<|start|>user\nWrite red 7.{END}\n<|start|>assistant\nred red.{END}"
    )


def test_a_completion_and_its_end_mark_are_supervised_without_a_template(
    plain: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], plain, data_settings("rows"))
    assert supervised_text(example, plain) == "red red." + END
    assert plain.decode(example.input_ids) == "Write red 7.red red." + END


def test_generation_starts_where_the_completion_starts(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], chat, data_settings("rows"))
    assert (
        chat.decode(example.input_ids[: example.prompt_tokens])
        == f"<|start|>user\nWrite red 7.{END}\n<|start|>assistant\n"
    )
    assert example.reference == "red red."


def test_all_tokens_of_a_text_except_the_first_are_supervised(
    plain: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([{"text": "The quick brown fox."}], plain, data_settings("rows"))
    assert plain.decode(example.input_ids) == "The quick brown fox." + END
    assert example.supervised == [False] + [True] * (len(example.input_ids) - 1)


def test_only_the_answers_of_a_conversation_are_supervised(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([{"messages": TALK}], chat, data_settings("rows", max_tokens=200))
    assert supervised_text(example, chat) == f"red it is{END}red, once more{END}"
    assert chat.decode(example.input_ids) == str(
        chat.apply_chat_template(TALK, tokenize=False)
    ).removesuffix("\n")


def test_the_last_answer_of_a_conversation_is_generated(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([{"messages": TALK}], chat, data_settings("rows", max_tokens=200))
    assert chat.decode(example.input_ids[: example.prompt_tokens]).endswith(
        f"Again.{END}\n<|start|>assistant\n"
    )
    assert example.reference == "red, once more"


def test_a_last_question_without_an_answer_is_left_out(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    settings = data_settings("rows", max_tokens=200)
    unanswered = [*TALK, {"role": "user", "content": "And now?"}]
    example = only([{"messages": unanswered}], chat, settings)
    assert example == only([{"messages": TALK}], chat, settings)


def test_a_pair_equals_a_conversation_of_one_turn(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    turns = [
        {"role": "user", "content": PAIR["prompt"]},
        {"role": "assistant", "content": PAIR["completion"]},
    ]
    settings = data_settings("rows")
    assert only([PAIR], chat, settings) == only([{"messages": turns}], chat, settings)


def test_a_long_example_is_truncated_on_the_right(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    full = only([PAIR], chat, data_settings("rows", max_tokens=200))
    limit = full.prompt_tokens + 2
    truncated = only([PAIR], chat, data_settings("rows", max_tokens=limit))
    assert truncated.input_ids == full.input_ids[:limit]
    assert truncated.supervised == full.supervised[:limit]
    assert truncated.was_cut and not full.was_cut


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_the_error_for_an_empty_cell_names_the_row(
    chat: PreTrainedTokenizerBase, data_settings: Maker, column: str
) -> None:
    with pytest.raises(DataError, match=f"row 3 has an empty {column}; fill or remove it"):
        only([PAIR, PAIR, {**PAIR, column: ""}], chat, data_settings("rows"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is it red?", "completion": 1},
        {"text": 5},
        {"messages": "Write red."},
        {"messages": [TALK[0], {"role": "assistant", "content": None}]},
        {"messages": TALK[1:]},
    ],
    ids=[
        "a number to complete",
        "a number as text",
        "text as messages",
        "an answer without content",
        "an answer before any question",
    ],
)
def test_the_error_for_a_malformed_row_names_its_number(
    chat: PreTrainedTokenizerBase, data_settings: Maker, row: Values
) -> None:
    with pytest.raises(DataError, match="row 1"):
        only([row], chat, data_settings("rows"))


def test_the_error_for_a_conversation_without_an_answer_names_the_row(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    with pytest.raises(DataError, match="row 2 has no message of role 'assistant'"):
        only([{"messages": TALK}, {"messages": TALK[:1]}], chat, data_settings("rows"))


def test_conversations_need_a_template(
    plain: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    with pytest.raises(DataError, match="no chat template; use prompt and completion"):
        only([{"messages": TALK}], plain, data_settings("rows"))


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tiny_folder: Path, data_settings: Maker
) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    with pytest.raises(DataError, match="row 1: the chat template rewrites earlier turns"):
        only([{"messages": TALK}], tokenizer, data_settings("rows"))


def test_the_error_for_a_missing_group_column_lists_the_columns(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    with pytest.raises(DataError, match="group_column 'author' is not one of prompt, completion"):
        only([PAIR], chat, data_settings("rows", group_column="author"))


@pytest.mark.parametrize(
    ("row", "column", "group"),
    [({**PAIR, "author": "Ada"}, "author", "Ada"), ({**PAIR, "group": "g"}, None, "g")],
    ids=["the named column", "a column called group"],
)
def test_the_group_comes_from(
    chat: PreTrainedTokenizerBase, data_settings: Maker, row: Values, column: str | None, group: str
) -> None:
    assert only([row], chat, data_settings("rows", group_column=column)).group == group


def test_rows_with_the_same_prompt_are_one_group(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    rows = [PAIR, {**PAIR, "completion": "another."}, {**PAIR, "prompt": "Something else."}]
    one, same, other = (only([row], chat, data_settings("rows")).group for row in rows)
    assert one == same != other
