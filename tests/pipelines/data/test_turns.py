"""Answers with reasoning or tool calls are learned completely, or their row is refused."""

from collections.abc import Mapping
from typing import Any

import pytest
from chat_templates import (
    CHANNELS,
    CHATML,
    HEADERS,
    INSTRUCTIONS,
    MODEL_ROLE,
    NEXT_ROLE,
    OPEN_CHATML,
    OPEN_THINKING,
    PREFILLED,
    THINKING,
    WORDS,
    make_tokenizer,
)
from rendered_rows import (
    ANSWER,
    NEXT_ANSWER,
    NEXT_QUESTION,
    QUESTION,
    call_and_result,
    learned,
    prompt_of,
    render,
    render_one,
    talk,
)
from transformers import PreTrainedTokenizerBase

from pipelines.data.conversation import Conversation, Message
from pipelines.errors import DataError

EMPTY = "<think>\n\n</think>\n\n"
REASONED = f"<think>\nI remember.\n</think>\n\n{ANSWER}"
SHOW_TOOLS = "{% if tools %}{{ '<|system|>\n' + tools | tojson }}{% endif %}"
SHOW_CALLS = "m['content'] + (m.tool_calls[0].function.name + ARGUMENTS if m.tool_calls else '') +"
CALLED = '\n<tool_call>\n{"name": "open_drawer", "arguments": {"drawer": 4}}\n</tool_call>'


def thinking(template: str = THINKING) -> PreTrainedTokenizerBase:
    return make_tokenizer(template, eos="<|im_end|>")


def answer_with(content: str, fields: Mapping[str, Any]) -> Conversation:
    return Conversation((Message("user", QUESTION), Message("assistant", content, True, fields)))


def with_calls(arguments: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose template writes the arguments of calls like this."""
    calls = SHOW_CALLS.replace("ARGUMENTS", arguments)
    return make_tokenizer(SHOW_TOOLS + CHATML.replace("m['content'] +", calls), eos="<|im_end|>")


def test_an_empty_thinking_block_is_part_of_the_prompt() -> None:
    tokenizer = thinking()
    example = render_one(talk(QUESTION, ANSWER), tokenizer)
    assert prompt_of(example, tokenizer).endswith(EMPTY)
    assert learned(example, tokenizer) == [f"{ANSWER}<|im_end|>"]
    assert example.notes == ("empty thinking",)


def test_an_empty_thinking_block_is_learned_if_wanted() -> None:
    tokenizer = thinking()
    example = render_one(talk(QUESTION, ANSWER), tokenizer, supervise_empty_thinking=True)
    assert learned(example, tokenizer) == [f"{EMPTY}{ANSWER}<|im_end|>"]
    assert example.notes == ("empty thinking",)


@pytest.mark.parametrize(
    "block",
    ["<think>\n\n</think>\n\n", "[THINK][/THINK]", "<seed:think></seed:think>", "◁think▷◁/think▷",
     "<|START_THINKING|><|END_THINKING|>"],
)  # fmt: skip
def test_any_empty_block_is_recognized(block: str) -> None:
    template = CHATML.replace(
        "m['content'] +", f"({block!r} if m.role == 'assistant' else '') + m['content'] +"
    )
    example = render_one(talk(QUESTION, ANSWER), thinking(template))
    assert learned(example, thinking(template)) == [f"{ANSWER}<|im_end|>"]
    assert example.notes == ("empty thinking",)


def test_the_reasoning_of_a_row_is_learned() -> None:
    tokenizer = thinking()
    rows = [talk(QUESTION, REASONED), answer_with(ANSWER, {"reasoning_content": "I remember."})]
    for row, reference in zip(rows, (REASONED, ANSWER), strict=True):
        example = render_one(row, tokenizer)
        assert learned(example, tokenizer) == [f"{REASONED}<|im_end|>"]
        assert example.notes == ()
        assert example.reference == reference


def test_reasoning_can_follow_the_tag_of_the_generation_prompt() -> None:
    tokenizer = thinking(OPEN_THINKING)
    example = render_one(talk(QUESTION, REASONED), tokenizer)
    assert prompt_of(example, tokenizer).endswith("<think>\n")
    assert learned(example, tokenizer) == [f"I remember.\n</think>\n\n{ANSWER}<|im_end|>"]


def test_each_answer_has_its_history_as_at_inference() -> None:
    tokenizer = thinking()
    first, second = render(talk(QUESTION, REASONED, NEXT_QUESTION, NEXT_ANSWER), tokenizer)
    assert learned(first, tokenizer) == [f"{REASONED}<|im_end|>"]
    assert learned(second, tokenizer) == [f"{NEXT_ANSWER}<|im_end|>"]
    assert "I remember." not in tokenizer.decode(second.input_ids)
    assert all("one example per answer" in example.notes for example in (first, second))
    assert first.group == second.group


def test_another_generation_prompt_is_noted_and_the_answer_learned_as_rendered() -> None:
    tokenizer = make_tokenizer(PREFILLED, bos="<s>")
    example = render_one(talk(QUESTION, ANSWER), tokenizer)
    assert prompt_of(example, tokenizer) == f"<s><|user|>{QUESTION}<|assistant|>"
    assert learned(example, tokenizer) == [f"{ANSWER}</s>"]
    assert example.notes == ("other generation prompt",)


def test_calls_and_answers_are_learned_and_results_are_not() -> None:
    tokenizer = thinking(SHOW_TOOLS + THINKING)
    example = render_one(call_and_result(), tokenizer)
    called, answered = learned(example, tokenizer)
    assert called.strip() == f"{CALLED}<|im_end|>".strip()
    assert answered == f"{ANSWER}<|im_end|>"
    assert example.reference == ANSWER


def test_the_reference_of_a_call_is_its_rendering() -> None:
    tokenizer = thinking(SHOW_TOOLS + THINKING)
    row = call_and_result("I will look.")
    example = render_one(Conversation(row.messages[:2], row.tools), tokenizer)
    assert example.reference == "I will look."
    row = call_and_result()
    example = render_one(Conversation(row.messages[:2], row.tools), tokenizer)
    assert example.reference.strip() == CALLED.strip()


def test_a_call_ends_with_its_own_token() -> None:
    template = CHANNELS.replace("{% for", SHOW_TOOLS + "{% for", 1)
    tokenizer = make_tokenizer(template, eos="<|return|>")
    called, answered = learned(render_one(call_and_result(), tokenizer), tokenizer)
    assert called == '<|channel|>commentary to=open_drawer<|message|>{"drawer": 4}<|call|>'
    assert answered == f"<|channel|>final<|message|>{ANSWER}<|return|>"


def test_a_call_without_an_end_token_ends_with_the_role_of_its_result() -> None:
    template = NEXT_ROLE.replace("<sop>", "<sop>" + SHOW_TOOLS)
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    row = call_and_result()
    called, answered = learned(render_one(row, tokenizer), tokenizer)
    assert called == '<tool_call>open_drawer{"drawer": 4}</tool_call><|observation|>'
    assert answered == f"{ANSWER}<|user|>"
    alone = render_one(Conversation(row.messages[:2], row.tools), tokenizer)
    assert learned(alone, tokenizer) == [called]


@pytest.mark.parametrize(
    "arguments",
    ["m.tool_calls[0].function.arguments | tojson", "m.tool_calls[0].function.arguments"],
    ids=["as JSON of an object", "as JSON text"],
)
def test_arguments_are_written_as_json(arguments: str) -> None:
    tokenizer = with_calls(arguments)
    called, _ = learned(render_one(call_and_result(), tokenizer), tokenizer)
    assert called == 'open_drawer{"drawer": 4}<|im_end|>'


@pytest.mark.parametrize(
    ("tokenizer", "row", "message"),
    [
        (make_tokenizer(PREFILLED, bos="<s>"), talk(QUESTION, REASONED), "drops content of"),
        (thinking(CHATML), answer_with(ANSWER, {"reasoning_content": "Hm."}), "drops reasoning_"),
        (thinking(), call_and_result(), r"has tools \(open_drawer\).*remove the column tools"),
        (with_calls("'()'"), call_and_result(), "drops tool_calls"),
        (
            make_tokenizer(CHANNELS.replace("{% for", SHOW_TOOLS + "{% for", 1), eos="<|return|>"),
            call_and_result("I will look."),
            "drops content of the answer",
        ),
        (make_tokenizer(MODEL_ROLE, bos="<s>"), talk(QUESTION, ANSWER, system="Be brief."),
         "no system role"),
        (
            thinking(CHATML.replace("in messages", "in messages if m.role != 'system'")),
            talk(QUESTION, ANSWER, system="Be brief."),
            "has the system message 'Be brief.'",
        ),
        (
            thinking("{% for m in messages %}{{ '<|im_start|>' ~ m ~ '<|im_end|>' }}{% endfor %}"
                     + OPEN_CHATML),
            talk(QUESTION, ANSWER),
            "does not render as written",
        ),
        (make_tokenizer(WORDS, eos=None), talk(QUESTION, ANSWER), "set data.eos_token"),
    ],
)  # fmt: skip
def test_a_row_that_the_template_changes_is_refused(
    tokenizer: PreTrainedTokenizerBase, row: Conversation, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        render(row, tokenizer)


def test_a_result_that_is_not_rendered_is_refused() -> None:
    template = SHOW_TOOLS + THINKING.replace(
        "in messages %}{{", "in messages if m.role != 'tool' %}{{"
    )
    assert template != SHOW_TOOLS + THINKING
    with pytest.raises(DataError, match="has the tool result 'blue pens'"):
        render(call_and_result(), thinking(template))


def test_a_system_message_in_the_last_question_gives_one_example_per_answer() -> None:
    tokenizer = make_tokenizer(INSTRUCTIONS, bos="<s>")
    row = talk(QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER, system="Be brief.")
    first, second = render(row, tokenizer)
    assert prompt_of(first, tokenizer) == f"<s>[INST] Be brief.\n\n{QUESTION} [/INST]"
    assert f"[INST] {QUESTION} [/INST]" in prompt_of(second, tokenizer)


def test_a_template_that_trims_contents_is_accepted() -> None:
    tokenizer = make_tokenizer(HEADERS, eos="<|eot|>", bos="<s>")
    example = render_one(talk(f" {QUESTION}\n", f"\n{ANSWER} "), tokenizer)
    assert learned(example, tokenizer) == [f"{ANSWER}<|eot|>"]


def test_supervising_everything_leaves_out_an_answer_that_the_template_rewrites() -> None:
    tokenizer = thinking()
    row = talk(QUESTION, REASONED, NEXT_QUESTION, NEXT_ANSWER, learn="all")
    messages = [*row.messages]
    messages[1] = Message("assistant", REASONED)
    example = render_one(Conversation(tuple(messages)), tokenizer)
    everything = "".join(learned(example, tokenizer))
    assert ANSWER not in everything
    assert NEXT_QUESTION in everything and NEXT_ANSWER in everything


def test_end_tokens_that_are_not_declared_special_end_an_answer() -> None:
    template = CHATML.replace("<|im_start|>", "<open>").replace("<|im_end|>", "<close>")
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    tokenizer.add_tokens(["<open>", "<close>"])
    example = render_one(talk(QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER), tokenizer)
    assert learned(example, tokenizer) == [f"{ANSWER}<close>", f"{NEXT_ANSWER}<close>"]
    assert example.end_token == tokenizer.convert_tokens_to_ids("<close>")


def test_a_template_for_tools_is_used_for_rows_with_tools() -> None:
    tokenizer = thinking()
    tokenizer.chat_template = {"default": THINKING, "tool_use": SHOW_TOOLS + THINKING}
    assert len(learned(render_one(call_and_result(), tokenizer), tokenizer)) == 2


def test_reasoning_that_the_next_question_removes_ends_with_the_next_role() -> None:
    block = "{% if loop.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content }}"
    template = NEXT_ROLE.replace(
        "{% for call", block + "{{ '</think>' + m.content }}{% endif %}{% for call", 1
    )
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    example = render_one(answer_with(ANSWER, {"reasoning_content": "Hm."}), tokenizer)
    assert learned(example, tokenizer) == [f"{ANSWER}<think>Hm.</think>{ANSWER}<|user|>"]


def test_a_template_for_lists_of_parts_receives_them() -> None:
    template = CHATML.replace("m['content']", "m['content'][0]['text']")
    tokenizer = thinking(template)
    row = talk(QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER)
    assert learned(render_one(row, tokenizer), tokenizer) == [
        f"{ANSWER}<|im_end|>",
        f"{NEXT_ANSWER}<|im_end|>",
    ]
