"""For usual templates and tokenizers, tokens are those of inference, and answers are learned."""

from dataclasses import replace
from random import Random

import pytest
from chat_templates import CORES, TEMPLATES, make_tokenizer
from rendered_rows import (
    ANSWER,
    NEXT_ANSWER,
    NEXT_QUESTION,
    QUESTION,
    applied,
    learned,
    render,
    talk,
    text_of,
)

from pipelines.config.data_section import DataSection
from pipelines.data.conversation import Conversation, Message
from pipelines.data.rendering.conversation_rendering import ConversationRenderer
from pipelines.data.rendering.renderer import Renderer
from pipelines.errors import DataError

EOS = {
    "chatml": "<|im_end|>",
    "headers": "<|eot|>",
    "thinking": "<|im_end|>",
    "open thinking": "<|im_end|>",
    "channels": "<|return|>",
    "two ends": "<|/turn|>",
    "next role": "<|endoftext|>",
    "EOS after all": "<|endoftext|>",
    "EOS after end": "<|endoftext|>",
}
ENDS = {
    "chatml": ("<|im_end|>", "<|im_end|>"),
    "headers": ("<|eot|>", "<|eot|>"),
    "model role": ("</turn>", "</turn>"),
    "EOS after all": ("<|end|>", "<|end|>"),
    "EOS after end": ("<|end|>", "<|end|>"),
    "thinking": ("<|im_end|>", "<|im_end|>"),
    "open thinking": ("<|im_end|>", "<|im_end|>"),
    "next role": ("<|user|>", "<|user|>"),
    "words": ("</s>", "</s>"),
    "instructions": ("</s>", "</s>"),
    "channels": ("<|end|>", "<|return|>"),
    "two ends": ("<|/reply|><|/turn|>", "<|/reply|><|/turn|>"),
    "prefilled": ("</s>", "</s>"),
}
"""What ends an answer that is followed by another question, and the last one."""
STARTS = {"channels": "<|channel|>final<|message|>", "two ends": "<|reply|>"}
"""What the model generates before the answer."""
ONE_EXAMPLE_PER_ANSWER = {"thinking", "open thinking", "words"}
CONTENTS = [
    *("a", "m", "<", "user", "None", "🙂", "naïve 東京", "tab\tseparated", "<b>bold</b>"),
    *("  padded \n", "\nnewline before", "newline after\n\n", "has <|im_end|> in it"),
    *("ends with </s>", "<think>\nHm.\n</think>\n\nBlue.", "<think></think>\n\nBlue."),
]
TWO_TURNS = talk(QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_both_answers_are_learned_with_their_end_tokens(name: str, core: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name], core=core, eos=EOS.get(name, "</s>"), bos="<s>")
    examples = render(TWO_TURNS, tokenizer)
    assert len(examples) == (2 if name in ONE_EXAMPLE_PER_ANSWER else 1)
    texts = [text for example in examples for text in learned(example, tokenizer)]
    start = STARTS.get(name, "")
    inner, last = ENDS[name]
    wanted = [f"{start}{ANSWER}{inner}", f"{start}{NEXT_ANSWER}{last}"]
    if core == "whole words":  # its text is not the original one
        wanted = [
            text_of(tokenizer(text, add_special_tokens=False).input_ids, tokenizer)
            for text in wanted
        ]
    assert [text.replace(" ", "") for text in texts] == [text.replace(" ", "") for text in wanted]
    assert examples[-1].reference == NEXT_ANSWER


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"words"}))
def test_tokens_equal_those_of_transformers(name: str, core: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name], core=core, eos=EOS.get(name, "</s>"), bos="<s>")
    last = render(TWO_TURNS, tokenizer)[-1]
    tokens = applied(TWO_TURNS, tokenizer)
    if name == "next role":
        tokens.append(tokenizer.convert_tokens_to_ids("<|user|>"))
    assert last.input_ids == tokens


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    "name", sorted(set(TEMPLATES) - {"thinking", "open thinking", "two ends", "prefilled"})
)
def test_the_prompt_equals_that_of_inference(name: str, core: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name], core=core, eos=EOS.get(name, "</s>"), bos="<s>")
    last = render(TWO_TURNS, tokenizer)[-1]
    prompt = applied(TWO_TURNS, tokenizer, count=3, add_generation_prompt=True)
    assert last.input_ids[: last.prompt_tokens] == prompt
    assert last.supervised[last.prompt_tokens]


@pytest.mark.parametrize("name", TEMPLATES)
def test_layouts_give_what_each_row_alone_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick path and the exact one agree, also about contents that a template rewrites."""
    tokenizer = make_tokenizer(
        TEMPLATES[name], core="metaspace first", eos=EOS.get(name, "</s>"), bos="<s>"
    )
    settings = DataSection(source="rows", max_tokens=2000)
    rows = _random_rows(Random(0), 60)
    quick = Renderer(tokenizer, settings).render(rows)
    monkeypatch.setattr(ConversationRenderer, "_layouts_of", lambda self, row: [])
    exact = Renderer(tokenizer, settings).render(rows)
    assert _comparable(quick) == _comparable(exact)
    assert sum(not isinstance(outcome, DataError) for outcome in quick) > 20


def test_the_template_is_applied_once_for_each_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer(TEMPLATES["chatml"], eos="<|im_end|>")
    renderer = Renderer(tokenizer, DataSection(source="rows", max_tokens=2000))
    contents = [QUESTION, ANSWER] * 30
    renderer.render([talk(*contents)])
    applied_to = []
    original = tokenizer.apply_chat_template

    def apply(messages: list[object], **how: object) -> object:
        applied_to.append(len(messages))
        return original(messages, **how)

    monkeypatch.setattr(tokenizer, "apply_chat_template", apply)
    [[example], _] = renderer.render([talk(*contents), talk(*contents)])
    assert applied_to == [2]
    assert len(learned(example, tokenizer)) == 30


def _random_rows(random: Random, count: int) -> list[Conversation]:
    rows = []
    for _ in range(count):
        messages = list[Message]()
        if random.random() < 0.3:
            messages.append(Message("system", random.choice(CONTENTS)))
        for turn in range(random.randint(1, 3)):
            is_learned = turn == 0 or random.random() < 0.7
            messages.append(Message("user", random.choice(CONTENTS)))
            messages.append(Message("assistant", random.choice(CONTENTS), is_learned))
        while not messages[-1].supervised:
            messages.pop()
        if random.random() < 0.2:
            messages = [replace(one, supervised=random.random() < 0.8) for one in messages]
            messages[-1] = replace(messages[-1], supervised=True)
        rows.append(Conversation(tuple(messages)))
    return rows


def _comparable(outcomes: list[object]) -> list[object]:
    return [str(one) if isinstance(one, DataError) else one for one in outcomes]
