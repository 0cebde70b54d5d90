"""The recipe's chat template and end token are used as written, or refused."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, HEADERS, THINKING, WORDS, make_tokenizer
from rendered_rows import ANSWER, QUESTION, learned, pair, render_one, talk
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from pipelines.config.data_section import DataSection
from pipelines.data.rendering.templates import prepared_tokenizer
from pipelines.errors import DataError


def prepared(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreTrainedTokenizerBase:
    return prepared_tokenizer(tokenizer, DataSection.model_validate({"source": "rows", **settings}))


def test_a_tokenizer_without_overrides_is_returned_itself() -> None:
    tokenizer = make_tokenizer(CHATML)
    assert prepared(tokenizer) is tokenizer


def test_overrides_do_not_change_the_original() -> None:
    tokenizer = make_tokenizer()
    changed = prepared(tokenizer, chat_template="chatml", eos_token="<|im_end|>")
    assert changed.eos_token == "<|im_end|>" and changed.chat_template
    assert tokenizer.eos_token == "</s>" and tokenizer.chat_template is None


def test_chatml_ends_answers_with_its_own_token() -> None:
    tokenizer = prepared(make_tokenizer(), chat_template="chatml")
    example = render_one(talk(QUESTION, ANSWER), tokenizer)
    assert learned(example, tokenizer) == [f"{ANSWER}<|im_end|>"]
    assert example.end_token == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_chatml_needs_its_tokens() -> None:
    with pytest.raises(DataError, match=r"needs the token '<\|im_start\|>'.*it becomes '<', '\|'"):
        prepared(ByT5Tokenizer(), chat_template="chatml")


def test_a_template_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(HEADERS)
    tokenizer = prepared(make_tokenizer(bos="<s>"), chat_template=str(file))
    assert learned(render_one(talk(QUESTION, ANSWER), tokenizer), tokenizer) == [f"{ANSWER}<|eot|>"]


def test_the_error_for_a_missing_file_has_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jinja' is not chatml, none or a readable"):
        prepared(make_tokenizer(), chat_template=str(tmp_path / "nowhere.jinja"))


def test_a_file_that_is_not_a_template_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}")
    with pytest.raises(DataError, match="is not a valid Jinja template"):
        prepared(make_tokenizer(), chat_template=str(file))


def test_without_a_template_pairs_are_verbatim_and_conversations_refused() -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    example = render_one(pair(prompt, ANSWER), tokenizer, chat_template="none")
    assert tokenizer.decode(example.input_ids) == f"{prompt}{ANSWER}<|im_end|>"
    with pytest.raises(DataError, match="is a conversation, but"):
        render_one(talk(QUESTION, ANSWER), tokenizer, chat_template="none")


def test_an_end_token_outside_the_vocabulary_is_refused_with_its_pieces() -> None:
    with pytest.raises(DataError, match=r"eos_token needs the token '<none>'.*'<', 'n', "):
        prepared(make_tokenizer(), eos_token="<none>")


def test_the_end_token_of_the_recipe_ends_an_answer() -> None:
    tokenizer = make_tokenizer(WORDS, eos=None)
    example = render_one(talk(QUESTION, ANSWER), tokenizer, eos_token="<|end|>")
    assert learned(example, tokenizer) == [f" {ANSWER}<|end|>"]


def test_arguments_reach_the_template() -> None:
    tokenizer = make_tokenizer(THINKING, eos="<|im_end|>")
    arguments = {"enable_thinking": False}
    example = render_one(talk(QUESTION, ANSWER), tokenizer, template_arguments=arguments)
    assert example.notes == ()  # the generation prompt has the empty block
    assert tokenizer.decode(example.input_ids[: example.prompt_tokens]).endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("template", "name", "message"),
    [
        (THINKING, "thinking", r"has no effect: .* uses .*enable_thinking"),
        (CHATML, "enable_thinking", r"has no effect: .* uses none"),
        (THINKING, "add_generation_prompt", "which the pipeline sets"),
        (THINKING, "messages", "which the pipeline sets"),
        (None, "enable_thinking", "the base has no chat template"),
    ],
)
def test_an_argument_without_effect_is_refused(
    template: str | None, name: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(make_tokenizer(template), template_arguments={name: True})


def test_arguments_of_a_template_that_marks_answers_are_recognized() -> None:
    marked = THINKING.replace("{{ answer }}", "{% generation %}{{ answer }}{% endgeneration %}")
    tokenizer = make_tokenizer(marked)
    found = prepared(tokenizer, template_arguments={"enable_thinking": True})
    assert found.chat_template == "{% set enable_thinking = true %}" + marked
    assert tokenizer.chat_template == marked
