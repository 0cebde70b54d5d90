"""What a chat template makes of a row that may be unintended is noted, or refused."""

from dataclasses import replace

import pytest
from rendered_rows import ANSWER, QUESTION, call_and_result, render_one, talk
from transformers import PreTrainedTokenizerBase

from pipelines.data.conversation import PlainText
from pipelines.data.notes import MEANING
from pipelines.errors import DataError

DATED = (
    "Date: {{ strftime_now('%Y-%m-%d') }}\n"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TOOL_TAGS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'tool' %}<tool_response>\n{{ m['content'] }}\n</tool_response>"
    "{% else %}{{ m['content'] }}{% for call in m['tool_calls'] or [] %}"
    "{{ call['function'] | tojson }}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "text", [f"<|im_start|>user\n{QUESTION}<|im_end|>", f"[INST] {QUESTION} [/INST] {ANSWER}"]
)
def test_marks_of_another_template_are_noted(chat: PreTrainedTokenizerBase, text: str) -> None:
    assert "marks of another template" in render_one(PlainText(text), chat).notes
    assert "marks of another template" in render_one(talk(text, ANSWER), chat).notes


def test_a_row_without_marks_has_no_note(chat: PreTrainedTokenizerBase) -> None:
    assert render_one(talk(QUESTION, ANSWER), chat).notes == ()


def test_a_template_with_a_date_is_noted(chat: PreTrainedTokenizerBase) -> None:
    example = render_one(talk(QUESTION, ANSWER), with_template(chat, DATED))
    assert example.notes == ("date in template",)
    assert "date" in MEANING["date in template"]


def test_a_tag_that_the_template_also_writes_is_refused(chat: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(chat, TOOL_TAGS)
    row = call_and_result()
    call, result = row.messages[1:3]
    assert render_one(row, tokenizer)
    wrapped = replace(result, content="<tool_response>\nblue pens\n</tool_response>")
    doubled = replace(row, messages=(row.messages[0], call, wrapped, row.messages[3]))
    with pytest.raises(DataError, match="starts with <tool_response>, and the chat template"):
        render_one(doubled, tokenizer)
