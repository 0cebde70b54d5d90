"""Conversations with weights, other roles, unusual text, and the settings that read them."""

from typing import Any

from dataset_checks.expectations import Learned, RowCase, chat, chatml, messages
from dataset_checks.schema_cases import (
    ANSWER,
    ASK,
    BRIEF,
    ONE,
    TALK,
    TELL,
    USER,
)


def weighted(key: str, off: Any, on: Any) -> list[dict[str, Any]]:
    """Return two answers of which only the second one is learned."""
    first, wrong, second, right = messages(*TALK)
    return [first, {**wrong, key: off}, second, {**right, key: on}]


def roles(name: str, user: str, assistant: str, **settings: Any) -> RowCase:
    """Return the case of a conversation whose roles have other names."""
    talk = messages((user, ASK), (assistant, TELL))
    return RowCase(
        name, ({"messages": talk},), ONE, settings=settings, differs_from_trl="knows no such roles"
    )


WEIGHTS = tuple(
    RowCase(
        f"{key} {off!r}",
        ({"messages": weighted(key, off, on)},),
        chat(*TALK, learned=(3,)),
        differs_from_trl="ignores the weight",
    )
    for key, off, on in (("weight", 0, 1), ("weight", 0.0, None), ("train", False, True))
)
ROLES = (
    roles("roles User/Assistant", "User", "Assistant"),
    roles("roles human/gpt", "human", "gpt"),
    roles("roles user/model", "user", "model"),
    roles("roles user/bot", "user", "bot"),
    roles("mapped roles", "kunde", "berater", roles={"kunde": "user", "berater": "assistant"}),
    RowCase(
        "role developer",
        ({"messages": messages(("developer", "Be brief."), USER, ANSWER)},),
        chat(BRIEF, USER, ANSWER),
        differs_from_trl="renders the role as it is",
    ),
)
CONTENTS = (
    RowCase(
        "content parts",
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": ASK}]},
                    {"role": "assistant", "content": [{"type": "text", "text": TELL}]},
                ]
            },
        ),
        ONE,
        differs_from_trl="renders the parts as Python",
    ),
    *(
        RowCase(
            f"unicode: {name}",
            ({"prompt": text, "completion": text},),
            chat(("user", text), ("assistant", text)),
        )
        for name, text in (
            ("composed and decomposed", "caf\u00e9 cafe\u0301"),
            ("emoji", "\U0001f469\u200d\U0001f467 box"),
            ("right to left", "\u05ea\u05d9\u05d1\u05d4 \u202bab\u202c"),
            ("line separators", "a\u2028b\u0085c"),
            ("NUL and BOM", "a\x00b\ufeffc"),
        )
    ),
    RowCase(
        "white space around an answer",
        ({"prompt": ASK, "completion": "\n  return 3\n"},),
        chat(USER, ("assistant", "\n  return 3\n")),
    ),
    RowCase(
        "the word None",
        ({"prompt": ASK, "completion": "It is None now."},),
        chat(USER, ("assistant", "It is None now.")),
    ),
    RowCase(
        "Jinja in the contents",
        ({"prompt": "{{ 7 * 7 }} {% if %}", "completion": "{{ x }}"},),
        chat(("user", "{{ 7 * 7 }} {% if %}"), ("assistant", "{{ x }}")),
    ),
    RowCase(
        "HTML in the contents",
        ({"prompt": "<b>q</b> & 'x'", "completion": '<i>a</i> & "b"'},),
        chat(("user", "<b>q</b> & 'x'"), ("assistant", '<i>a</i> & "b"')),
    ),
    RowCase(
        "special token in an answer",
        ({"prompt": ASK, "completion": "Write <|im_end|> here."},),
        chat(USER, ("assistant", "Write <|im_end|> here.")),
        notes=("special tokens in text",),
    ),
    RowCase(
        "two answers in a row",
        ({"messages": messages(USER, ANSWER, ("assistant", "It is closed."))},),
        chat(USER, ANSWER, ("assistant", "It is closed.")),
    ),
    RowCase(
        "answer repeats the question",
        ({"messages": messages(USER, ("assistant", ASK), USER, ("assistant", ASK))},),
        chat(USER, ("assistant", ASK), USER, ("assistant", ASK)),
    ),
    RowCase("other columns", ({"id": 3, "prompt": ASK, "completion": TELL, "tags": ["a"]},), ONE),
)
SETTINGS = (
    RowCase(
        "max_tokens: 30",
        ({"messages": messages(*TALK)},),
        (
            Learned(
                chatml(USER, ANSWER) + "<|im_start|>user\nAnd its lid?",
                (f"{TELL}<|im_end|>",),
                TALK[-1][1],
            ),
        ),
        settings={"max_tokens": 30},
    ),
    RowCase(
        "supervise: all, weight 0",
        ({"messages": [{**messages(USER)[0], "weight": 0}, *messages(ANSWER)]},),
        ONE,
        settings={"supervise": "all"},
    ),
    RowCase(
        "supervise: last",
        ({"messages": messages(*TALK)},),
        chat(*TALK, learned=(3,)),
        settings={"supervise": "last"},
    ),
    RowCase(
        "supervise: all",
        ({"messages": messages(USER, ANSWER)},),
        (
            Learned(
                chatml(USER, ANSWER), (chatml(USER, ANSWER).removeprefix("<|im_start|>"),), TELL
            ),
        ),
        settings={"supervise": "all"},
        differs_from_trl="masks the prompt",
    ),
    RowCase(
        "chat_template: chatml",
        ({"messages": messages(*TALK)},),
        chat(*TALK),
        "plain",
        settings={"chat_template": "chatml"},
        differs_from_trl="has no template",
    ),
    RowCase(
        "chat_template: none",
        ({"prompt": f"{ASK}\n", "completion": TELL},),
        (Learned(f"{ASK}\n{TELL}<|im_end|>", (f"{TELL}<|im_end|>",), TELL),),
        settings={"chat_template": "none"},
        differs_from_trl="applies the template",
    ),
    RowCase(
        "column called group",
        (
            {"group": "a", "prompt": ASK, "completion": TELL},
            {"group": "a", "prompt": "Other?", "completion": TELL},
        ),
        (*ONE, *chat(("user", "Other?"), ANSWER)),
        groups=2,
    ),
    RowCase(
        "group_column",
        (
            {"author": "a", "prompt": ASK, "completion": TELL},
            {"author": "a", "prompt": "Other?", "completion": TELL},
        ),
        (*ONE, *chat(("user", "Other?"), ANSWER)),
        settings={"group_column": "author"},
        groups=1,
    ),
    RowCase(
        "exploded turns",
        ({"messages": messages(*TALK[:2])}, {"messages": messages(*TALK)}),
        (*ONE, *chat(*TALK)),
        groups=1,
    ),
)
CASES = (*WEIGHTS, *ROLES, *CONTENTS, *SETTINGS)
