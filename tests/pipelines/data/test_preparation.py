"""What is prepared is what was written: the supervised tokens spell the completion and its end mark, and nothing else.

Groups stay whole in the split, the same seed gives the same split anywhere, and rows that cannot be used are named.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pipelines.data.preparation import Example, prepare, split_by_group, tokenize
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
    """Return a function that prepares data settings in a stage folder; it gives the figures and the folder."""

    def run(
        settings: Values, *, seed: int = 7, runs: str = "runs", base: Path = tiny_folder
    ) -> tuple[Values, Path]:
        inputs, paths = {"data": settings, "seed": seed}, {"base": str(base)}
        folder = Stage("data", "rows", inputs, tmp_path / runs, paths).begin()
        figures, files = prepare(folder, inputs, paths)
        assert all((folder / name).is_file() for name in files)
        return figures, folder

    return run


def only(rows: list[Values], tokenizer: PreTrainedTokenizerBase, settings: Values) -> Example:
    [example] = tokenize(Dataset.from_list(rows), tokenizer, settings)
    return example


def supervised_text(example: Example | Values, tokenizer: PreTrainedTokenizerBase) -> str:
    values = example if isinstance(example, dict) else vars(example)
    return tokenizer.decode(
        [
            token
            for token, is_learnt in zip(values["input_ids"], values["supervised"], strict=True)
            if is_learnt
        ]
    )


def examples_of(*groups: str) -> list[Example]:
    return [Example([1, 2], [False, True], 1, "x", group, False) for group in groups]


def test_a_completion_and_its_end_mark_are_learnt_under_a_template(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], chat, data_settings("rows"))
    assert supervised_text(example, chat) == "red red." + END
    assert (
        chat.decode(example.input_ids)
        == f"<|start|>user\nSay red 7.{END}\n<|start|>assistant\nred red.{END}"
    )


def test_a_completion_and_its_end_mark_are_learnt_without_a_template(
    plain: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], plain, data_settings("rows"))
    assert supervised_text(example, plain) == "red red." + END
    assert plain.decode(example.input_ids) == "Say red 7.red red." + END


def test_generation_starts_where_the_completion_does(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([PAIR], chat, data_settings("rows"))
    assert (
        chat.decode(example.input_ids[: example.prompt_tokens])
        == f"<|start|>user\nSay red 7.{END}\n<|start|>assistant\n"
    )
    assert example.reference == "red red."


def test_of_a_text_all_but_the_first_token_is_learnt(
    plain: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([{"text": "The quick brown fox."}], plain, data_settings("rows"))
    assert plain.decode(example.input_ids) == "The quick brown fox." + END
    assert example.supervised == [False] + [True] * (len(example.input_ids) - 1)


def test_of_a_conversation_only_the_answers_are_learnt(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([{"messages": TALK}], chat, data_settings("rows", max_tokens=200))
    assert supervised_text(example, chat) == f"red it is{END}red, once more{END}"
    assert chat.decode(example.input_ids) == str(
        chat.apply_chat_template(TALK, tokenize=False)
    ).removesuffix("\n")


def test_of_a_conversation_the_last_answer_is_generated(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    example = only([{"messages": TALK}], chat, data_settings("rows", max_tokens=200))
    assert chat.decode(example.input_ids[: example.prompt_tokens]).endswith(
        f"Again.{END}\n<|start|>assistant\n"
    )
    assert example.reference == "red, once more"


def test_what_is_asked_last_and_not_answered_is_left_out(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    asked = [*TALK, {"role": "user", "content": "And now?"}]
    assert only([{"messages": asked}], chat, data_settings("rows", max_tokens=200)) == only(
        [{"messages": TALK}], chat, data_settings("rows", max_tokens=200)
    )


def test_a_pair_is_a_conversation_of_one_turn(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    turns = [
        {"role": "user", "content": PAIR["prompt"]},
        {"role": "assistant", "content": PAIR["completion"]},
    ]
    assert only([PAIR], chat, data_settings("rows")) == only(
        [{"messages": turns}], chat, data_settings("rows")
    )


def test_a_long_example_is_cut_on_the_right(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    whole = only([PAIR], chat, data_settings("rows", max_tokens=200))
    limit = whole.prompt_tokens + 2
    cut = only([PAIR], chat, data_settings("rows", max_tokens=limit))
    assert (cut.input_ids, cut.supervised) == (whole.input_ids[:limit], whole.supervised[:limit])
    assert (cut.was_cut, whole.was_cut) == (True, False)


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_an_empty_half_is_refused_by_row(
    chat: PreTrainedTokenizerBase, data_settings: Maker, column: str
) -> None:
    with pytest.raises(DataError, match=f"row 3 has an empty {column}; fill or remove it"):
        list(
            tokenize(
                Dataset.from_list([PAIR, PAIR, {**PAIR, column: ""}]), chat, data_settings("rows")
            )
        )


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
def test_a_row_that_cannot_be_rendered_is_refused_by_number(
    chat: PreTrainedTokenizerBase, data_settings: Maker, row: Values
) -> None:
    with pytest.raises(DataError, match="row 1"):
        list(tokenize(Dataset.from_list([row]), chat, data_settings("rows")))


def test_a_conversation_without_an_answer_is_refused_by_row(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    with pytest.raises(DataError, match="row 2 has no message of role 'assistant'"):
        list(
            tokenize(
                Dataset.from_list([{"messages": TALK}, {"messages": TALK[:1]}]),
                chat,
                data_settings("rows"),
            )
        )


def test_conversations_need_a_template(
    plain: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    with pytest.raises(DataError, match="no chat template; use prompt and completion"):
        list(tokenize(Dataset.from_list([{"messages": TALK}]), plain, data_settings("rows")))


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tiny_folder: Path, data_settings: Maker
) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    with pytest.raises(DataError, match="row 1: the chat template rewrites earlier turns"):
        list(tokenize(Dataset.from_list([{"messages": TALK}]), tokenizer, data_settings("rows")))


def test_a_group_column_that_is_not_there_is_refused_with_those_that_are(
    chat: PreTrainedTokenizerBase, data_settings: Maker
) -> None:
    with pytest.raises(DataError, match="group_column 'author' is none of prompt, completion"):
        list(
            tokenize(Dataset.from_list([PAIR]), chat, data_settings("rows", group_column="author"))
        )


@pytest.mark.parametrize(
    ("row", "column", "group"),
    [({**PAIR, "author": "Ada"}, "author", "Ada"), ({**PAIR, "group": "g"}, None, "g")],
    ids=["the named column", "a column called group"],
)
def test_the_group_is(
    chat: PreTrainedTokenizerBase, data_settings: Maker, row: Values, column: str | None, group: str
) -> None:
    assert only([row], chat, data_settings("rows", group_column=column)).group == group


def test_rows_that_ask_the_same_are_one_group(
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
def test_no_group_is_on_both_sides(groups: list[str], held_out: int, seed: int) -> None:
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
def test_too_few_rows_are_refused_with_both_numbers(groups: str, held_out: int) -> None:
    with pytest.raises(
        DataError,
        match=rf"{len(groups)} usable rows in {len(set(groups))} groups .* validation_examples={held_out}",
    ):
        split_by_group(examples_of(*groups), held_out, 7)


def test_the_split_is_drawn_by_the_seed() -> None:
    examples = examples_of(*map(str, range(60)))
    first, again, other = (split_by_group(examples, 8, seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_rows_that_come_later_move_none() -> None:
    """What one run held out, no later run trains on: else a champion would be scored on what it has learnt."""
    before = split_by_group(examples_of(*map(str, range(300))), 8, 7)
    after = split_by_group(examples_of(*map(str, range(-40, 340))), 8, 7)
    sides = [
        {name: {example.group for example in part} for name, part in split.items()}
        for split in (before, after)
    ]
    assert not sides[0]["train"] & (sides[1]["validation"] | sides[1]["tuning"])
    assert not (sides[0]["validation"] | sides[0]["tuning"]) & sides[1]["train"]


def test_a_preparation_keeps_every_row(
    prepared: Callable[..., tuple[Values, Path]], pairs_file: Path, data_settings: Maker
) -> None:
    figures, folder = prepared(data_settings(pairs_file))
    train, validation = (
        list(load_from_disk(str(folder / split))) for split in ("train", "validation")
    )
    assert (figures["rows"], figures["left_out"], figures["cut"]) == (60, 0, 0)
    assert (
        (figures["train_examples"], figures["validation_examples"])
        == (len(train), len(validation))
        == (52, 8)
    )
    assert figures["train_tokens"] == sum(len(example["input_ids"]) for example in train)
    assert figures["supervised_tokens"] == sum(sum(example["supervised"]) for example in train)


def test_what_is_saved_spells_the_rows(
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


def test_two_preparations_agree(
    prepared: Callable[..., tuple[Values, Path]], pairs_file: Path, data_settings: Maker
) -> None:
    first, second = (prepared(data_settings(pairs_file), runs=runs) for runs in ("here", "there"))
    assert first[1] != second[1]
    assert first[0] == second[0]


def test_another_seed_gives_another_digest(
    prepared: Callable[..., tuple[Values, Path]], pairs_file: Path, data_settings: Maker
) -> None:
    first, second = (prepared(data_settings(pairs_file), seed=seed)[0] for seed in (7, 8))
    assert first["digest"] != second["digest"]


def test_some_completions_cut_off_are_left_out_and_counted(
    prepared: Callable[..., tuple[Values, Path]],
    write_rows: Callable[..., Path],
    data_settings: Maker,
) -> None:
    rows = [{"prompt": f"Say red {i}.", "completion": "red"} for i in range(40)]
    long_prompts = [{"prompt": "sheep " * 60, "completion": "red"} for _ in range(3)]
    long_answers = [{"prompt": f"Say much {i}.", "completion": "red " * 60} for i in range(5)]
    figures, folder = prepared(data_settings(write_rows(rows + long_prompts + long_answers)))
    assert (figures["rows"], figures["left_out"], figures["cut"]) == (48, 3, 5)
    assert figures["train_examples"] == 45 - 8
    assert all(any(example["supervised"]) for example in load_from_disk(str(folder / "train")))


def test_all_completions_cut_off_are_refused(
    prepared: Callable[..., tuple[Values, Path]],
    write_rows: Callable[..., Path],
    data_settings: Maker,
) -> None:
    path = write_rows([{"prompt": "sheep " * 60, "completion": "red"} for _ in range(20)])
    with pytest.raises(
        DataError,
        match=r"all 20 completions of .* are cut off by max_tokens=64; raise it or shorten",
    ):
        prepared(data_settings(path))
