"""The supervised tokens decode to the completion and its end mark, and nothing else.

Groups are never divided between splits, the same seed gives the same split everywhere, and the
error for an unusable row names its number.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pipelines.data.example import Example
from pipelines.data.preparation import prepare, tokenize
from pipelines.data.splitting import split_by_group
from pipelines.errors import DataError
from pipelines.models.tokenizer import load_tokenizer
from pipelines.runtime.stage import Stage

Values = dict[str, Any]
Maker = Callable[..., Values]
END = "<|end|>"
PAIR = {"prompt": "Say red 7.", "completion": "red red."}
TALK = [
    {"role": "user", "content": "Say red."},
    {"role": "assistant", "content": "red it is"},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "red, once more"},
]


@pytest.fixture(scope="module")
def chat(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(plain_folder)


@pytest.fixture
def prepared(tmp_path: Path, tiny_folder: Path) -> Callable[..., tuple[Values, Path]]:
    """Return a function that prepares data in a stage folder; it returns metrics and folder."""

    def run(
        settings: Values, *, seed: int = 7, runs: str = "runs", base: Path = tiny_folder
    ) -> tuple[Values, Path]:
        inputs = {"data": settings, "seed": seed}
        paths = {"base": str(base)}
        folder = Stage("data", "rows", inputs, tmp_path / runs, paths).begin()
        metrics, files = prepare(folder, inputs, paths)
        assert all((folder / name).is_file() for name in files)
        return metrics, folder

    return run


def only(rows: list[Values], tokenizer: PreTrainedTokenizerBase, settings: Values) -> Example:
    [example] = tokenize(Dataset.from_list(rows), tokenizer, settings)
    return example


def supervised_text(example: Example | Values, tokenizer: PreTrainedTokenizerBase) -> str:
    values = example if isinstance(example, dict) else vars(example)
    tokens = zip(values["input_ids"], values["supervised"], strict=True)
    return tokenizer.decode([token for token, is_supervised in tokens if is_supervised])


def examples_of(*groups: str) -> list[Example]:
    return [Example([1, 2], [False, True], 1, "x", group, False) for group in groups]


def test_a_completion_and_its_end_mark_are_supervised_with_a_template(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], chat, data_settings("rows"))
    assert supervised_text(example, chat) == "red red." + END
    assert (
        chat.decode(example.input_ids)
        == f"<|start|>user\nSay red 7.{END}\n<|start|>assistant\nred red.{END}"
    )


def test_a_completion_and_its_end_mark_are_supervised_without_a_template(
    plain: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], plain, data_settings("rows"))
    assert supervised_text(example, plain) == "red red." + END
    assert plain.decode(example.input_ids) == "Say red 7.red red." + END


def test_generation_starts_where_the_completion_starts(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], chat, data_settings("rows"))
    assert (
        chat.decode(example.input_ids[: example.prompt_tokens])
        == f"<|start|>user\nSay red 7.{END}\n<|start|>assistant\n"
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
        {"messages": "Say red."},
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


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60),
    st.integers(1, 12),
    st.integers(0, 5),
)
def test_no_group_is_in_train_and_in_another_split(
    groups: list[str], held_out: int, seed: int
) -> None:
    examples = examples_of(*groups)
    try:
        train, validation, tuning = split_by_group(examples, held_out, seed).values()
    except DataError:
        return
    assert not {example.group for example in train} & {
        example.group for example in [*validation, *tuning]
    }
    assert len(validation) == held_out <= len(train) and len(tuning) <= held_out
    drawn = [id(example) for example in [*train, *validation, *tuning]]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= {id(example) for example in examples}


@pytest.mark.parametrize(
    ("groups", "held_out"),
    [("abcdef", 4), ("aaaaaaaaaa", 2), ("ab", 8)],
    ids=["too few rows", "one group", "far too few"],
)
def test_the_error_for_too_few_rows_names_both_numbers(groups: str, held_out: int) -> None:
    counts = f"{len(groups)} usable rows in {len(set(groups))} groups"
    with pytest.raises(DataError, match=rf"{counts} .* validation_examples={held_out}"):
        split_by_group(examples_of(*groups), held_out, 7)


def test_the_split_depends_on_the_seed() -> None:
    examples = examples_of(*map(str, range(60)))
    split = split_by_group(examples, 8, 7)
    assert split == split_by_group(examples, 8, 7)
    assert split != split_by_group(examples, 8, 8)


def test_rows_that_are_added_later_do_not_move_others() -> None:
    """No later run trains on held-out rows: a champion is never evaluated on its training data."""
    before = split_by_group(examples_of(*map(str, range(300))), 8, 7)
    after = split_by_group(examples_of(*map(str, range(-40, 340))), 8, 7)
    assert not groups_in(before, "train") & groups_in(after, "validation", "tuning")
    assert not groups_in(before, "validation", "tuning") & groups_in(after, "train")


def groups_in(splits: dict[str, list[Example]], *names: str) -> set[str]:
    return {example.group for name in names for example in splits[name]}


def test_every_row_is_kept(
    prepared: Callable[..., tuple[Values, Path]], pairs_file: Path, data_settings: Maker
) -> None:
    metrics, folder = prepared(data_settings(pairs_file))
    train, validation = (
        list(load_from_disk(str(folder / split))) for split in ("train", "validation")
    )
    assert (metrics["rows"], metrics["left_out"], metrics["cut"]) == (60, 0, 0)
    assert (
        (metrics["train_examples"], metrics["validation_examples"])
        == (len(train), len(validation))
        == (52, 8)
    )
    assert metrics["train_tokens"] == sum(len(example["input_ids"]) for example in train)
    assert metrics["supervised_tokens"] == sum(sum(example["supervised"]) for example in train)


def test_the_saved_tokens_decode_to_the_rows(
    prepared: Callable[..., tuple[Values, Path]],
    pairs_file: Path,
    data_settings: Maker,
    chat: PreTrainedTokenizerBase,
) -> None:
    _, folder = prepared(data_settings(pairs_file))
    for example in load_from_disk(str(folder / "validation")):
        word, number = chat.decode(example["input_ids"]).partition("Say ")[2].split(".")[0].split()
        assert int(number) < 60
        assert supervised_text(example, chat) == f"{word} {word}.{END}"


def test_preparation_is_reproducible(
    prepared: Callable[..., tuple[Values, Path]], pairs_file: Path, data_settings: Maker
) -> None:
    first, second = (prepared(data_settings(pairs_file), runs=runs) for runs in ("here", "there"))
    assert first[1] != second[1]
    assert first[0] == second[0]


def test_the_digest_depends_on_the_seed(
    prepared: Callable[..., tuple[Values, Path]], pairs_file: Path, data_settings: Maker
) -> None:
    first, second = (prepared(data_settings(pairs_file), seed=seed)[0] for seed in (7, 8))
    assert first["digest"] != second["digest"]


def test_truncated_completions_are_left_out_and_counted(
    prepared: Callable[..., tuple[Values, Path]],
    write_rows: Callable[..., Path],
    data_settings: Maker,
) -> None:
    rows = [{"prompt": f"Say red {i}.", "completion": "red"} for i in range(40)]
    long_prompts = [{"prompt": "sheep " * 60, "completion": "red"} for _ in range(3)]
    long_answers = [{"prompt": f"Say much {i}.", "completion": "red " * 60} for i in range(5)]
    metrics, folder = prepared(data_settings(write_rows(rows + long_prompts + long_answers)))
    assert (metrics["rows"], metrics["left_out"], metrics["cut"]) == (48, 3, 5)
    assert metrics["train_examples"] == 45 - 8
    assert all(any(example["supervised"]) for example in load_from_disk(str(folder / "train")))


def test_data_without_any_complete_prompt_is_refused(
    prepared: Callable[..., tuple[Values, Path]],
    write_rows: Callable[..., Path],
    data_settings: Maker,
) -> None:
    path = write_rows([{"prompt": "sheep " * 60, "completion": "red"} for _ in range(20)])
    with pytest.raises(
        DataError,
        match=r"all 20 completions of .* are cut off by max_tokens=64; raise it or use shorter",
    ):
        prepared(data_settings(path))
