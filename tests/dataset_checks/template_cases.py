"""The same conversations with every template and tokenizer."""

from typing import Any

from dataset_checks.expectations import Learned, RowCase, chatml, marked, messages, refused
from dataset_checks.schema_cases import AGAIN, ASK, BRIEF, MORE, TALK, TELL, USER

THOUGHT = "I look."
THINKING = f"<think>\n{THOUGHT}\n</think>\n\n{TELL}"
FALCON_ONE = f"User: {ASK}\n\nAssistant:"
EMPTY = "<think>\n\n</think>\n\n"
QWEN_3_ONE = chatml(USER) + f"<|im_start|>assistant\n{EMPTY}«{TELL}<|im_end|>»\n"
QWEN_3_TWO = chatml(*TALK[:3]) + f"<|im_start|>assistant\n{EMPTY}«{MORE}<|im_end|>»\n"
CHANNELS_ONE = (
    f"<|start|>user<|message|>{ASK}<|end|>"
    f"<|start|>assistant«<|channel|>final<|message|>{TELL}<|return|>»"
)
RETURN_ENDS = "ends an inner answer with the token of the last one"


def talk(base: str, text: str, *notes: str, differs: str = "") -> RowCase:
    """Return the case of a conversation with two answers in one example."""
    row = {"messages": messages(*TALK)}
    expected = (marked(text, MORE),)
    return RowCase(f"{base}: talk", (row,), expected, base, notes=notes, differs_from_trl=differs)


def reply(base: str, text: str, *notes: str, differs: str = "") -> RowCase:
    """Return the case of a prompt and a completion."""
    row = {"prompt": ASK, "completion": TELL}
    expected = (marked(text, TELL),)
    return RowCase(f"{base}: pair", (row,), expected, base, notes=notes, differs_from_trl=differs)


def thoughtful(name: str, base: str, expected: tuple[Learned, ...], **answer: Any) -> RowCase:
    """Return the case of an answer with reasoning."""
    row = {"messages": [*messages(USER), {"role": "assistant", **answer}]}
    return RowCase(f"{base}: {name}", (row,), expected, base)


def llama_turn(role: str, content: str) -> str:
    """Return a turn of Llama 3."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}"


def two_turns(user: str, assistant: str, end: str, *, start: str = "") -> str:
    """Return the marked conversation of a template that writes turns one after the other."""
    first = f"{user}{ASK}{end}\n{assistant}«{TELL}{end}»\n"
    return f"{start}{first}{user}{AGAIN}{end}\n{assistant}«{MORE}{end}»\n"


CHATML = (
    talk(
        "chatml without eos",
        two_turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>").replace(
            "»\n", "\n»"
        ),
        differs="needs an EOS",
    ),
    talk(
        "chatml, other eos",
        two_turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
    ),
    talk(
        "chatml, bos and eos",
        two_turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
    ),
    RowCase(
        "chatml without eos: None",
        ({"prompt": ASK, "completion": "It is None now."},),
        (
            Learned(
                chatml(USER, ("assistant", "It is None now.")),
                ("It is None now.<|im_end|>\n",),
                "It is None now.",
            ),
        ),
        "chatml without eos",
    ),
    RowCase(
        "plain without eos: None",
        ({"prompt": ASK, "completion": " It is None now."},),
        refused("eos_token"),
        "plain without eos",
    ),
    reply("default system", f"{chatml(BRIEF, USER)}<|im_start|>assistant\n«{TELL}<|im_end|>»\n"),
    RowCase(
        "default system: system",
        ({"system": "Be long.", "prompt": ASK, "completion": TELL},),
        (
            marked(
                chatml(("system", "Be long."), USER)
                + f"<|im_start|>assistant\n«{TELL}<|im_end|>»\n",
                TELL,
            ),
        ),
        "default system",
    ),
)
FAMILIES = (
    talk(
        "llama 3",
        "<|begin_of_text|>"
        + llama_turn("user", f"{ASK}<|eot_id|>")
        + llama_turn("assistant", f"«{TELL}<|eot_id|>»")
        + llama_turn("user", f"{AGAIN}<|eot_id|>")
        + llama_turn("assistant", f"«{MORE}<|eot_id|>»"),
    ),
    RowCase(
        "llama 3: white space",
        ({"prompt": ASK, "completion": f" {TELL}\n"},),
        (
            marked(
                "<|begin_of_text|>"
                + llama_turn("user", f"{ASK}<|eot_id|>")
                + llama_turn("assistant", f"«{TELL}<|eot_id|>»"),
                f" {TELL}\n",
            ),
        ),
        "llama 3",
    ),
    talk(
        "gemma",
        two_turns(
            "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>", start="<bos>"
        ),
    ),
    RowCase(
        "gemma 3: system",
        ({"system": "Be brief.", "prompt": ASK, "completion": TELL},),
        (
            marked(
                f"<bos><start_of_turn>user\nBe brief.\n\n{ASK}<end_of_turn>\n"
                f"<start_of_turn>model\n«{TELL}<end_of_turn>»\n",
                TELL,
            ),
        ),
        "gemma 3",
    ),
    talk(
        "phi 3",
        two_turns("<|user|>\n", "<|assistant|>\n", "<|end|>") + "<|endoftext|>",
        differs="also learns the EOS after the end of the turn",
    ),
    talk("zephyr", two_turns("<|user|>\n", "<|assistant|>\n", "</s>")),
    talk("zephyr, first", two_turns("<|user|>\n", "<|assistant|>\n", "</s>")),
    talk("mistral", f"<s>[INST] {ASK} [/INST]« {TELL}</s>»[INST] {AGAIN} [/INST]« {MORE}</s>»"),
    talk("mistral v3", f"<s>[INST] {ASK} [/INST]« {TELL}</s>»[INST] {AGAIN} [/INST]« {MORE}</s>»"),
    RowCase(
        "falcon: talk",
        ({"messages": messages(*TALK)},),
        (
            marked(f"{FALCON_ONE}« {TELL}<|endoftext|>»", TELL),
            marked(
                f"{FALCON_ONE} {TELL}\n\nUser: {AGAIN}\n\nAssistant:« {MORE}<|endoftext|>»", MORE
            ),
        ),
        "falcon",
        notes=("one example per answer",),
        differs_from_trl="learns no end",
    ),
    talk(
        "glm",
        f"[gMASK]<sop><|user|>\n{ASK}<|assistant|>\n«{TELL}<|user|>»\n{AGAIN}"
        f"<|assistant|>\n«{MORE}<|user|>»",
        differs="learns no end",
    ),
    reply("plain metaspace", f"{ASK}«{TELL}</s>»"),
)
CHANNELS = (
    reply("channels", CHANNELS_ONE),
    talk(
        "channels",
        CHANNELS_ONE.replace("<|return|>", "<|end|>")
        + f"<|start|>user<|message|>{AGAIN}<|end|>"
        + f"<|start|>assistant«<|channel|>final<|message|>{MORE}<|return|>»",
        differs=RETURN_ENDS,
    ),
    thoughtful(
        "thinking",
        "channels",
        (
            marked(
                f"<|start|>user<|message|>{ASK}<|end|><|start|>assistant"
                f"«<|channel|>analysis<|message|>{THOUGHT}<|end|>"
                f"<|start|>assistant<|channel|>final<|message|>{TELL}<|return|>»",
                TELL,
            ),
        ),
        content=TELL,
        thinking=THOUGHT,
    ),
)
THOUGHTS = (
    reply("qwen 3", QWEN_3_ONE, "empty thinking", differs="learns the empty thinking"),
    RowCase(
        "qwen 3: supervise_empty_thinking",
        ({"prompt": ASK, "completion": TELL},),
        (marked(QWEN_3_ONE.replace(f"{EMPTY}«", f"«{EMPTY}"), TELL),),
        "qwen 3",
        notes=("empty thinking",),
        settings={"supervise_empty_thinking": True},
    ),
    RowCase(
        "qwen 3: enable_thinking false",
        ({"prompt": ASK, "completion": TELL},),
        (marked(QWEN_3_ONE, TELL),),
        "qwen 3",
        settings={"template_arguments": {"enable_thinking": False}},
        differs_from_trl="is not given the argument",
    ),
    RowCase(
        "qwen 3: talk",
        ({"messages": messages(*TALK)},),
        (marked(QWEN_3_ONE, TELL), marked(QWEN_3_TWO, MORE)),
        "qwen 3",
        notes=("empty thinking", "one example per answer"),
        differs_from_trl="learns the empty thinking",
    ),
    thoughtful(
        "reasoning key",
        "qwen 3",
        (marked(chatml(USER) + f"<|im_start|>assistant\n«{THINKING}<|im_end|>»\n", TELL),),
        content=TELL,
        reasoning_content=THOUGHT,
    ),
    thoughtful(
        "reasoning in the content",
        "qwen 3",
        (marked(chatml(USER) + f"<|im_start|>assistant\n«{THINKING}<|im_end|>»\n", THINKING),),
        content=THINKING,
    ),
    reply(
        "prefilled think", f"<s><|user|>{ASK}<|assistant|>«{TELL}</s>»", "other generation prompt"
    ),
    RowCase(
        "prefilled think: reasoning",
        ({"prompt": ASK, "completion": THINKING},),
        refused("think"),
        "prefilled think",
    ),
)
CASES = (*CHATML, *FAMILIES, *CHANNELS, *THOUGHTS)
