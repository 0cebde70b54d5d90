"""Tokenizers that differ as real ones do: special tokens, what is put around a text, and spaces.

They are trained on a few sentences, so that they are made in milliseconds.
"""

from collections.abc import Sequence

import chat_templates
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Which color has box 3? Box 3 is gray. And its lid? Lid 3 is red.",
    "The function returns None if the box is empty. user assistant system tool model",
    "def area(width, height): return width * height",
] * 3
SPECIAL = [
    "<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>",
    "<|message|>", "[gMASK]", "<sop>", "[INST]", "[/INST]", "<|tool|>",
]  # fmt: skip
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""Tokens of the vocabulary that a reader sees as text."""


def byte_level(
    eos: str | None, bos: str | None = None, *, special: Sequence[str] = SPECIAL
) -> PreTrainedTokenizerFast:
    """Return a tokenizer such as GPT-2's, SmolLM2's or Qwen's."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(
        TEXTS, vocab_size=420, special_tokens=list(special), show_progress=False
    )
    return _wrapped(core._tokenizer, eos, bos)


def with_bos(eos: str, bos: str) -> PreTrainedTokenizerFast:
    """Return one that puts a BOS before every text, such as Llama 3's and Gemma's."""
    return _surrounding(byte_level(eos, bos), f"{bos} $A")


def with_bos_and_eos(eos: str, bos: str) -> PreTrainedTokenizerFast:
    """Return one that also puts an EOS after every text, as with `add_eos_token`."""
    return _surrounding(byte_level(eos, bos), f"{bos} $A {eos}")


def metaspace(eos: str, bos: str) -> PreTrainedTokenizerFast:
    """Return one that puts a space before everything it encodes, such as Llama 2's."""
    return _wrapped(chat_templates.metaspace(TEXTS, SPECIAL), eos, bos)


def metaspace_first(eos: str, bos: str) -> PreTrainedTokenizerFast:
    """Return one that puts a space before the first word only, such as Mistral's since v3."""
    return _wrapped(chat_templates.metaspace_first(TEXTS, SPECIAL), eos, bos)


def _wrapped(core: Tokenizer, eos: str | None, bos: str | None) -> PreTrainedTokenizerFast:
    named = {"eos_token": eos, "bos_token": bos}
    given = {name: token for name, token in named.items() if token is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **given
    )
    tokenizer.add_tokens([AddedToken(token, special=False) for token in NOT_SPECIAL])
    return tokenizer


def _surrounding(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    ids = [
        (token, tokenizer.convert_tokens_to_ids(token))
        for token in (tokenizer.bos_token, tokenizer.eos_token)
    ]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=ids
    )
    return tokenizer
