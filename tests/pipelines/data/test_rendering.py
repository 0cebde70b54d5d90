"""Which tokens of a row are supervised, where its prompt ends, and what is noted about it."""

import pickle

import pytest
from chat_templates import CHATML, HEADERS, INSTRUCTIONS, make_tokenizer
from rendered_rows import (
    ANSWER,
    NEXT_ANSWER,
    NEXT_QUESTION,
    QUESTION,
    learned,
    pair,
    prompt_of,
    render,
    render_one,
    talk,
    text_of,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from pipelines.config.data_section import DataSection
from pipelines.data.conversation import Conversation, Message, PlainText
from pipelines.data.rendering.renderer import Renderer
from pipelines.errors import DataError

PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
TWO_TURNS = (QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerBase:
    return make_tokenizer(CHATML, eos="<|im_end|>", bos="<s>", around="<s> $A")


def plain(**changes: str | None) -> PreTrainedTokenizerBase:
    return make_tokenizer(**{"bos": "<s>", "around": "<s> $A", **changes})


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>"])
def test_a_text_is_learned_between_one_bos_and_one_eos(around: str) -> None:
    tokenizer = plain(around=around)
    for text in (ANSWER, f"<s>{ANSWER}", f"{ANSWER}</s>"):
        example = render_one(PlainText(text), tokenizer)
        assert text_of(example.input_ids, tokenizer) == f"<s>{ANSWER}</s>"
        assert example.supervised == [False] + [True] * (len(example.input_ids) - 1)
        assert example.end_token == tokenizer.eos_token_id
        assert example.reference == text


def test_the_first_token_of_a_text_without_bos_is_not_learned() -> None:
    example = render_one(PlainText(ANSWER), make_tokenizer())
    assert example.supervised == [False] + [True] * (len(example.input_ids) - 1)


def test_a_text_needs_an_end_token() -> None:
    with pytest.raises(DataError, match=r"has no eos_token; set data\.eos_token"):
        render(PlainText(ANSWER), make_tokenizer(eos=None))
    example = render_one(PlainText(ANSWER), make_tokenizer(eos=None), eos_token="<|end|>")
    assert example.end_token == example.input_ids[-1]


@pytest.mark.parametrize("core", ["byte level", "trimmed", "metaspace", "metaspace first"])
def test_a_pair_without_a_template_is_tokenized_as_one_text(core: str) -> None:
    tokenizer = plain(core=core)
    example = render_one(pair("Question: Answer:", " Blue pens."), tokenizer)
    complete = tokenizer("Question: Answer: Blue pens.").input_ids
    assert example.input_ids == [*complete, tokenizer.eos_token_id]
    prompt = tokenizer("Question: Answer:").input_ids
    assert example.input_ids[: example.prompt_tokens] == prompt
    start = len(prompt)
    assert example.supervised == [False] * start + [True] * (len(complete) - start + 1)


@pytest.mark.parametrize("core", ["byte level", "trimmed"])
def test_a_token_of_prompt_and_completion_is_learned(core: str) -> None:
    tokenizer = plain(core=core)
    example = render_one(pair("Answer: ", "pens. in"), tokenizer)
    assert "Ġpens" in tokenizer.convert_ids_to_tokens(example.input_ids)
    assert prompt_of(example, tokenizer) == "<s>Answer:"
    assert learned(example, tokenizer) == [" pens. in</s>"]


def test_an_answer_does_not_depend_on_an_eos_token() -> None:
    tokenizer = make_tokenizer(CHATML, eos=None)
    example = render_one(talk(QUESTION, "It returns None if empty."), tokenizer)
    assert learned(example, tokenizer) == ["It returns None if empty.<|im_end|>\n"]
    both = render_one(talk(*TWO_TURNS), tokenizer)
    assert learned(both, tokenizer) == [f"{ANSWER}<|im_end|>\n", f"{NEXT_ANSWER}<|im_end|>\n"]


def test_the_reference_is_the_answer_as_written(chatml: PreTrainedTokenizerBase) -> None:
    for answer in (ANSWER, "  padded\n", "has <|im_end|> inside"):
        assert render_one(talk(QUESTION, answer), chatml).reference == answer


def test_a_message_that_is_not_supervised_is_not_learned(chatml: PreTrainedTokenizerBase) -> None:
    messages = list(talk(*TWO_TURNS).messages)
    messages[1] = Message("assistant", ANSWER)
    example = render_one(Conversation(tuple(messages)), chatml)
    assert learned(example, chatml) == [f"{NEXT_ANSWER}<|im_end|>"]


def test_supervising_everything_leaves_out_the_first_token(
    chatml: PreTrainedTokenizerBase,
) -> None:
    example = render_one(talk(*TWO_TURNS, system="Answer.", learn="all"), chatml)
    assert example.supervised == [False] + [True] * (len(example.input_ids) - 1)
    assert prompt_of(example, chatml).endswith(
        f"{NEXT_QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.reference == NEXT_ANSWER


def test_supervising_everything_leaves_out_a_message_without_weight(
    chatml: PreTrainedTokenizerBase,
) -> None:
    messages = list(talk(*TWO_TURNS, learn="all").messages)
    messages[1] = Message("assistant", ANSWER)
    messages[2] = Message("user", NEXT_QUESTION)
    example = render_one(Conversation(tuple(messages)), chatml)
    first, *_, last = learned(example, chatml)
    assert first == f"user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert last.strip() == f"<|im_start|>assistant\n{NEXT_ANSWER}<|im_end|>"
    everything = "".join(learned(example, chatml))
    assert ANSWER not in everything and NEXT_QUESTION not in everything


def test_a_greeting_is_not_learned(chatml: PreTrainedTokenizerBase) -> None:
    greeting = Message("assistant", "Hello.")
    row = Conversation((greeting, *talk(QUESTION, ANSWER).messages))
    example = render_one(row, chatml)
    assert learned(example, chatml) == [f"{ANSWER}<|im_end|>"]
    assert "Hello." in prompt_of(example, chatml)


def test_a_greeting_with_weight_is_learned(chatml: PreTrainedTokenizerBase) -> None:
    greeting = Message("assistant", "Hello.", supervised=True)
    row = Conversation((greeting, *talk(QUESTION, ANSWER).messages))
    assert learned(render_one(row, chatml), chatml) == ["Hello.<|im_end|>", f"{ANSWER}<|im_end|>"]


@pytest.mark.parametrize("completion", [ANSWER, f"{ANSWER}<|im_end|>", f"{ANSWER}<|im_end|>\n"])
def test_a_rendered_prompt_is_not_rendered_again(
    chatml: PreTrainedTokenizerBase, completion: str
) -> None:
    example = render_one(pair(PROMPT, completion), chatml)
    assert prompt_of(example, chatml) == PROMPT
    assert learned(example, chatml) == [f"{ANSWER}<|im_end|>"]
    assert example.reference == ANSWER
    assert example.notes == ("already rendered",)


def test_a_rendered_prompt_has_one_bos_if_the_template_writes_it() -> None:
    tokenizer = make_tokenizer(HEADERS, eos="<|eot|>", bos="<s>", around="<s> $A")
    prompt = f"<|header|>user<|/header|>\n\n{QUESTION}<|eot|><|header|>assistant<|/header|>\n\n"
    for text in (prompt, f"<s>{prompt}"):
        example = render_one(pair(text, ANSWER), tokenizer)
        assert text_of(example.input_ids, tokenizer) == f"<s>{prompt}{ANSWER}<|eot|>"


def test_a_rendered_prompt_is_recognized_without_a_generation_prompt() -> None:
    tokenizer = make_tokenizer(INSTRUCTIONS, bos="<s>", around="<s> $A")
    example = render_one(pair(f"<s>[INST] {QUESTION} [/INST]", f" {ANSWER}</s>"), tokenizer)
    assert learned(example, tokenizer) == [f" {ANSWER}</s>"]
    assert example.notes == ("already rendered",)


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
def test_a_rendered_text_has_one_end_token(chatml: PreTrainedTokenizerBase, end: str) -> None:
    example = render_one(PlainText(f"{PROMPT}{ANSWER}{end}"), chatml)
    text = text_of(example.input_ids, chatml)
    assert text.strip() == f"{PROMPT}{ANSWER}<|im_end|>"
    assert example.notes == ("already rendered",)


def test_special_tokens_in_a_text_are_noted(chatml: PreTrainedTokenizerBase) -> None:
    row = pair(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\nNo.", f"Is it <|im_end|>? {ANSWER}")
    example = render_one(row, chatml)
    assert example.notes == ("special tokens in text",)
    assert learned(example, chatml) == [f"Is it <|im_end|>? {ANSWER}<|im_end|>"]
    assert render_one(pair(QUESTION, ANSWER), chatml).notes == ()


def test_conversations_of_one_first_question_are_one_group(
    chatml: PreTrainedTokenizerBase,
) -> None:
    group = render_one(talk(*TWO_TURNS), chatml).group
    assert render_one(talk(QUESTION, "Nothing."), chatml).group == group
    assert render_one(pair(QUESTION, ANSWER), chatml).group == group
    assert render_one(talk(NEXT_QUESTION, ANSWER), chatml).group != group
    assert render_one(talk(QUESTION, ANSWER, system="Answer."), chatml).group != group


def test_a_long_example_is_truncated_on_the_right_only_if_wanted(
    chatml: PreTrainedTokenizerBase,
) -> None:
    row = talk(QUESTION, ANSWER)
    full = render_one(row, chatml)
    limit = full.prompt_tokens + 1
    truncated = render_one(row, chatml, max_tokens=limit)
    assert truncated.input_ids == full.input_ids[:limit]
    assert truncated.supervised == full.supervised[:limit]
    assert truncated.was_cut and not full.was_cut
    for choice in ("drop", "error"):
        example = render_one(row, chatml, max_tokens=limit, long_examples=choice)
        assert example.input_ids == full.input_ids and example.was_cut


def test_rows_keep_their_order_next_to_rows_that_cannot_be_learned() -> None:
    raising = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = make_tokenizer(raising + CHATML)
    rows = [PlainText("a text"), talk("bad", ANSWER), talk(QUESTION, ANSWER), talk(*TWO_TURNS)]
    text, bad, one, two = Renderer(tokenizer, DataSection(source="rows")).render(rows)
    assert isinstance(bad, DataError)
    assert str(bad) == "does not fit the chat template of the base (no); fix or remove it"
    references = [outcome[0].reference for outcome in (text, one, two) if outcome is not bad]
    assert references == ["a text", ANSWER, NEXT_ANSWER]


def test_a_renderer_can_be_sent_to_another_process(chatml: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(chatml, DataSection(source="rows"))
    rows = [talk(*TWO_TURNS), PlainText("a text")]
    assert pickle.loads(pickle.dumps(renderer)).render(rows) == renderer.render(rows)  # noqa: S301


def test_a_tokenizer_without_offsets_gives_the_same_spans() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    example = render_one(talk(*TWO_TURNS), tokenizer)
    assert learned(example, tokenizer) == [f"{ANSWER}</s>", f"{NEXT_ANSWER}</s>"]


def test_conversations_need_a_template() -> None:
    with pytest.raises(DataError, match=r"no chat template; set data\.chat_template: chatml"):
        render(talk(QUESTION, ANSWER), make_tokenizer())
