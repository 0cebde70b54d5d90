"""A chat template is not applied to a row that it has already rendered, and writes one end."""

import pytest
from chat_templates import CHATML, make_tokenizer
from rendered_rows import (
    ANSWER,
    NEXT_ANSWER,
    NEXT_QUESTION,
    QUESTION,
    learned,
    pair,
    render_one,
    talk,
)

from pipelines.errors import DataError

PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant"


@pytest.mark.parametrize("after", ["<|im_end|>", "<|im_end|>\n", "</s>"])
def test_an_end_token_at_the_end_of_an_answer_is_not_repeated(after: str) -> None:
    tokenizer = make_tokenizer(CHATML)
    row = talk(QUESTION, ANSWER + after, NEXT_QUESTION, NEXT_ANSWER + after)
    example = render_one(row, tokenizer)
    expected = render_one(talk(QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER), tokenizer)
    assert example.input_ids == expected.input_ids
    assert example.supervised == expected.supervised
    assert example.reference == NEXT_ANSWER
    assert example.notes == ("special tokens in text",)


def test_an_end_token_within_an_answer_stays() -> None:
    tokenizer = make_tokenizer(CHATML)
    example = render_one(talk(QUESTION, f"Say <|im_end|> here. {ANSWER}"), tokenizer)
    assert learned(example, tokenizer) == [f"Say <|im_end|> here. {ANSWER}<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [pair(PROMPT, ANSWER), talk(PROMPT, ANSWER), talk(f"{PROMPT}\n", ANSWER, system="Be brief.")],
    ids=["stripped prompt", "message", "with a system message"],
)
def test_a_rendered_prompt_that_would_be_rendered_again_is_refused(row: object) -> None:
    with pytest.raises(DataError, match=r"'<\|im_start\|>assistant'.*applied twice.*chat_template"):
        render_one(row, make_tokenizer(CHATML))  # type: ignore[arg-type]
