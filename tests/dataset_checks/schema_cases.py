"""Rows in every schema that data sets have, with the tokens to learn."""

import json
from dataclasses import replace

from dataset_checks.expectations import Learned, Row, RowCase, chat, chatml, messages

ASK, TELL = "Which color has box 3?", "Box 3 is gray."
AGAIN, MORE = "And its lid?", "Lid 3 is red."
USER, ANSWER = ("user", ASK), ("assistant", TELL)
TALK = (USER, ANSWER, ("user", AGAIN), ("assistant", MORE))
BRIEF = ("system", "Be brief.")
ONE = chat(USER, ANSWER)
TWO = chat(*TALK)
TEXT = "# Box 3 is gray."
TEXT_LEARNED = Learned(f"{TEXT}<|im_end|>", (" Box 3 is gray.<|im_end|>",), TEXT)
"""The first token cannot be predicted, so it is not supervised."""


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """Return turns with the keys of ShareGPT."""
    return [{"from": role, "value": content} for role, content in turns]


def pair(name: str, prompt: str, completion: str) -> RowCase:
    """Return the case of a pair whose columns have other names."""
    return RowCase(name, ({prompt: ASK, completion: TELL},), ONE)


def one(name: str, row: Row, *turns: tuple[str, str], learned: tuple[int, ...]) -> RowCase:
    """Return the case of one row in which only some turns are learned."""
    return RowCase(name, (row,), chat(*turns, learned=learned))


TEXTS = (
    RowCase("text", ({"text": TEXT},), (TEXT_LEARNED,)),
    RowCase(
        "text that ends with the EOS",
        ({"text": TEXT + "<|im_end|>"},),
        (replace(TEXT_LEARNED, reference=TEXT + "<|im_end|>"),),
        notes=("special tokens in text",),
    ),
    RowCase("text with other columns", ({"id": 7, "text": TEXT, "url": "x"},), (TEXT_LEARNED,)),
    RowCase(
        "text under another name",
        ({"body": TEXT},),
        (TEXT_LEARNED,),
        settings={"columns": {"text": "body"}},
    ),
    RowCase(
        "text without a template",
        ({"text": TEXT},),
        (TEXT_LEARNED,),
        base="plain",
    ),
    RowCase(
        "text after a BOS",
        ({"text": TEXT},),
        (Learned(f"<|begin_of_text|>{TEXT}<|eot_id|>", (f"{TEXT}<|eot_id|>",), TEXT),),
        base="llama 3",
    ),
    RowCase(
        "text between BOS and EOS",
        ({"text": TEXT},),
        (Learned(f"<s>{TEXT}</s>", (f"{TEXT}</s>",), TEXT),),
        base="plain with bos and eos",
        differs_from_trl="writes the EOS twice",
    ),
)
PAIRS = (
    RowCase("prompt/completion", ({"prompt": ASK, "completion": TELL},), ONE),
    pair("question/answer", "question", "answer"),
    pair("instruction/response", "instruction", "response"),
    pair("input/output", "input", "output"),
    pair("query/response", "query", "response"),
    pair("capital letters", "Question", "Answer"),
    RowCase(
        "mapped columns",
        ({"frage": ASK, "antwort": TELL},),
        ONE,
        settings={"columns": {"prompt": "frage", "completion": "antwort"}},
    ),
    RowCase(
        "pair without a template",
        ({"prompt": f"{ASK}\n", "completion": TELL},),
        (Learned(f"{ASK}\n{TELL}<|im_end|>", (f"{TELL}<|im_end|>",), TELL),),
        base="plain",
    ),
    RowCase(
        "pair without a template, BOS",
        ({"prompt": f"{ASK}\n", "completion": TELL},),
        (Learned(f"<|begin_of_text|>{ASK}\n{TELL}<|eot_id|>", (f"{TELL}<|eot_id|>",), TELL),),
        base="plain with bos",
    ),
    RowCase(
        "conversational pair",
        ({"prompt": messages(USER), "completion": messages(ANSWER)},),
        ONE,
    ),
    one(
        "conversational pair, long prompt",
        {"prompt": messages(*TALK[:3]), "completion": messages(TALK[3])},
        *TALK,
        learned=(3,),
    ),
    RowCase(
        "conversational pair, answer of text",
        ({"prompt": messages(BRIEF, USER), "completion": TELL},),
        chat(BRIEF, USER, ANSWER),
    ),
    RowCase(
        "pair with a system",
        ({"system": "Be brief.", "prompt": ASK, "completion": TELL},),
        chat(BRIEF, USER, ANSWER),
    ),
    RowCase("pair, empty system", ({"system": "", "prompt": ASK, "completion": TELL},), ONE),
    RowCase(
        "system_prompt/question/response",
        ({"system_prompt": "Be brief.", "question": ASK, "response": TELL},),
        chat(BRIEF, USER, ANSWER),
    ),
    RowCase(
        "pair with a history",
        ({"prompt": AGAIN, "completion": MORE, "history": [[ASK, TELL]]},),
        TWO,
    ),
    RowCase(
        "Alpaca",
        ({"instruction": ASK, "input": "Box 3", "output": TELL},),
        chat(("user", f"{ASK}\nBox 3"), ANSWER),
    ),
    RowCase("Alpaca, empty input", ({"instruction": ASK, "input": "", "output": TELL},), ONE),
    RowCase("Alpaca, null input", ({"instruction": ASK, "input": None, "output": TELL},), ONE),
    RowCase(
        "Alpaca with a system and a history",
        (
            {
                "instruction": AGAIN,
                "input": "",
                "output": MORE,
                "system": "Be brief.",
                "history": [[ASK, TELL]],
            },
        ),
        chat(BRIEF, *TALK),
    ),
    RowCase(
        "dates as text",
        ({"prompt": "2024-01-31", "completion": "2024-02-01T00:00:00Z"},),
        chat(("user", "2024-01-31"), ("assistant", "2024-02-01T00:00:00Z")),
    ),
    RowCase(
        "numbers as text",
        ({"prompt": "007", "completion": "1.50"},),
        chat(("user", "007"), ("assistant", "1.50")),
    ),
)
CONVERSATIONS = (
    RowCase("messages", ({"messages": messages(USER, ANSWER)},), ONE),
    RowCase("messages, two answers", ({"messages": messages(*TALK)},), TWO),
    RowCase("messages with a system", ({"messages": messages(BRIEF, *TALK)},), chat(BRIEF, *TALK)),
    RowCase(
        "messages, empty system",
        ({"messages": messages(("system", ""), USER, ANSWER)},),
        ONE,
        differs_from_trl="renders an empty system turn",
    ),
    RowCase(
        "messages and a system column",
        ({"system": "Be brief.", "messages": messages(USER, ANSWER)},),
        chat(BRIEF, USER, ANSWER),
        differs_from_trl="ignores the system column",
    ),
    RowCase("unanswered question", ({"messages": messages(*TALK[:3])},), ONE),
    one(
        "greeting",
        {"messages": messages(("assistant", "Hello."), USER, ANSWER)},
        ("assistant", "Hello."),
        USER,
        ANSWER,
        learned=(2,),
    ),
    RowCase("messages as JSON text", ({"messages": json.dumps(messages(*TALK))},), TWO),
    RowCase(
        "messages as one list per key",
        ({"messages": {"role": ["user", "assistant"], "content": [ASK, TELL]}},),
        ONE,
    ),
    RowCase(
        "ShareGPT",
        ({"conversations": sharegpt(("human", ASK), ("gpt", TELL))},),
        ONE,
    ),
    RowCase(
        "ShareGPT with a system",
        ({"conversations": sharegpt(("system", "Be brief."), ("human", ASK), ("gpt", TELL))},),
        chat(BRIEF, USER, ANSWER),
    ),
    RowCase(
        "ShareGPT under messages",
        ({"messages": sharegpt(("human", ASK), ("gpt", TELL))},),
        ONE,
    ),
    RowCase("conversation column", ({"conversation": messages(*TALK)},), TWO),
    RowCase(
        "mapped messages",
        ({"verlauf": messages(*TALK)},),
        TWO,
        settings={"columns": {"messages": "verlauf"}},
    ),
)
RENDERED_PROMPT = chatml(USER) + "<|im_start|>assistant\n"
RENDERED_PAIR = (Learned(f"{RENDERED_PROMPT}{TELL}<|im_end|>", (f"{TELL}<|im_end|>",), TELL),)
RENDERED = (
    RowCase(
        "rendered text",
        ({"text": chatml(*TALK)},),
        (Learned(chatml(*TALK), (chatml(*TALK).removeprefix("<|im_start|>"),), chatml(*TALK)),),
        notes=("already rendered",),
    ),
    RowCase(
        "rendered prompt",
        ({"prompt": RENDERED_PROMPT, "completion": TELL + "<|im_end|>"},),
        RENDERED_PAIR,
        notes=("already rendered",),
    ),
    RowCase(
        "rendered prompt, bare answer",
        ({"prompt": RENDERED_PROMPT, "completion": TELL},),
        RENDERED_PAIR,
        notes=("already rendered",),
    ),
    RowCase(
        "special tokens in a question",
        ({"prompt": "What is <|im_end|>?", "completion": TELL},),
        chat(("user", "What is <|im_end|>?"), ANSWER),
        notes=("special tokens in text",),
    ),
)
CASES = (*TEXTS, *PAIRS, *CONVERSATIONS, *RENDERED)
