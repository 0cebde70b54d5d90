"""Pairs of a tokenizer and a chat template, by the name of the family they resemble."""

from collections.abc import Callable
from functools import cache, partial

from transformers import PreTrainedTokenizerFast

from dataset_checks import chat_formats
from dataset_checks.tokenizer_kinds import (
    byte_level,
    metaspace,
    metaspace_first,
    with_bos,
    with_bos_and_eos,
)

Maker = Callable[[], PreTrainedTokenizerFast]

CHATML_TOKENIZER = partial(byte_level, "<|im_end|>")
LLAMA_TOKENIZER = partial(with_bos, "<|eot_id|>", "<|begin_of_text|>")
GEMMA_TOKENIZER = partial(with_bos, "<eos>", "<bos>")
BASES: dict[str, tuple[Maker, str | None]] = {
    "chatml": (CHATML_TOKENIZER, chat_formats.CHATML),
    "plain": (CHATML_TOKENIZER, None),
    "plain with bos": (LLAMA_TOKENIZER, None),
    "plain with bos and eos": (partial(with_bos_and_eos, "</s>", "<s>"), None),
    "plain metaspace": (partial(metaspace, "</s>", "<s>"), None),
    "no special tokens": (partial(byte_level, None, special=()), None),
    "default system": (CHATML_TOKENIZER, chat_formats.DEFAULT_SYSTEM),
    "chatml without eos": (partial(byte_level, None), chat_formats.CHATML),
    "plain without eos": (partial(byte_level, None), None),
    "chatml, other eos": (partial(byte_level, "<|endoftext|>"), chat_formats.CHATML),
    "chatml, bos and eos": (partial(with_bos_and_eos, "</s>", "<s>"), chat_formats.CHATML),
    "llama 3": (LLAMA_TOKENIZER, chat_formats.LLAMA_3),
    "gemma": (GEMMA_TOKENIZER, chat_formats.GEMMA),
    "gemma 3": (GEMMA_TOKENIZER, chat_formats.GEMMA_WITH_SYSTEM),
    "phi 3": (partial(byte_level, "<|endoftext|>"), chat_formats.PHI_3),
    "qwen 3": (CHATML_TOKENIZER, chat_formats.QWEN_3),
    "channels": (partial(byte_level, "<|return|>"), chat_formats.CHANNELS),
    "glm": (partial(byte_level, "<|endoftext|>"), chat_formats.GLM),
    "falcon": (partial(byte_level, "<|endoftext|>"), chat_formats.FALCON),
    "mistral": (partial(metaspace, "</s>", "<s>"), chat_formats.MISTRAL),
    "mistral v3": (partial(metaspace_first, "</s>", "<s>"), chat_formats.MISTRAL),
    "zephyr": (partial(metaspace, "</s>", "<s>"), chat_formats.ZEPHYR),
    "zephyr, first": (partial(metaspace_first, "</s>", "<s>"), chat_formats.ZEPHYR),
    "prefilled think": (partial(byte_level, "</s>", "<s>"), chat_formats.PREFILLED_THINK),
    "drops system": (CHATML_TOKENIZER, chat_formats.DROPS_SYSTEM),
    "escapes": (CHATML_TOKENIZER, chat_formats.ESCAPES),
    "tools": (CHATML_TOKENIZER, chat_formats.TOOLS),
}
"""Name → a function that makes the tokenizer, and the template."""


@cache
def base(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a base, with its template."""
    make, template = BASES[name]
    tokenizer = make()
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
