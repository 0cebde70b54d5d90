"""Chat templates and tokenizers with the structure of usual ones."""

from collections.abc import Sequence

from tokenizers import (
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = [
    "What is in drawer 4? Drawer 4 has blue pens. And in the next one? It returns None if empty.",
    "user assistant system model tool Answer in one sentence. Question: Answer:",
] * 3
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<|endoftext|>", "<|header|>", "<|/header|>", "<|eot|>", "<turn>", "</turn>", "[INST]"),
    *("[/INST]", "<|channel|>", "<|message|>", "<|start|>", "<|return|>", "<|call|>", "[gMASK]"),
    *("<sop>", "<|observation|>", "<|reply|>", "<|/reply|>", "<|/turn|>", "<|system|>"),
]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""Added tokens that are not special."""

OPEN_CHATML = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}" + OPEN_CHATML
)
# Trims contents, and writes BOS.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
# Has no system role, requires alternating turns, and ends a turn with another token than EOS.
MODEL_ROLE = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\n' + m.content | trim + '</turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# Writes EOS after a conversation that is not continued.
EOS_AFTER_ALL = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
EOS_AFTER_END = EOS_AFTER_ALL.replace("<|end|>\n", "<|end|>")
# Drops the reasoning of earlier answers, and writes an empty block before the last.
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% set reasoning = m.reasoning_content or '' %}{% set answer = m.content %}"
    "{% if not reasoning and '</think>' in answer %}"
    "{% set reasoning = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set answer = answer.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}"
    "{{ answer }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
# The generation prompt opens the block.
OPEN_THINKING = THINKING.replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
)
# No token ends an answer: the next role follows.
NEXT_ROLE = (
    "[gMASK]<sop>{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Words instead of special tokens.
WORDS = (
    "{% for m in messages %}"
    "{{ m.role | capitalize + ': ' + m.content + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# EOS after each answer, which nothing opens; the system message is in the last question.
INSTRUCTIONS = (
    "{{ bos_token }}{% set system = '' %}"
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% set is_last = messages[loop.index0 + 1:] | selectattr('role', 'eq', 'user') | list == [] %}"
    "{{ '[INST] ' + (system if is_last else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# The last answer ends with another token than earlier ones.
CHANNELS = (
    "{{ '<|start|>system<|message|>Reasoning: low.<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}"
    "{{ '<|start|>assistant<|channel|>commentary to=' + m.tool_calls[0].function.name }}"
    "{{ '<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Two tokens end an answer.
TWO_ENDS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{{ '<|assistant|><think></think><|reply|>' + m.content + '<|/reply|><|/turn|>' }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|/turn|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The generation prompt opens a block that the rendering lacks.
PREFILLED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "model role": MODEL_ROLE,
    "EOS after all": EOS_AFTER_ALL,
    "EOS after end": EOS_AFTER_END,
    "thinking": THINKING,
    "open thinking": OPEN_THINKING,
    "next role": NEXT_ROLE,
    "words": WORDS,
    "instructions": INSTRUCTIONS,
    "channels": CHANNELS,
    "two ends": TWO_ENDS,
    "prefilled": PREFILLED,
}


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(TEXT, vocab_size=420, special_tokens=SPECIAL, show_progress=False)
    return core._tokenizer


def trimmed_byte_level() -> Tokenizer:
    """Byte-level, and the offsets of a token leave out its space."""
    core = byte_level()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return core


def metaspace(texts: Sequence[str] = TEXT, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """As Llama 2 and Mistral: a space is put before each text and after special tokens."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    _train_pieces(core, texts, special)
    return core


def metaspace_first(texts: Sequence[str] = TEXT, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """A space is put before the text only."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    _train_pieces(core, texts, special)
    return core


def _train_pieces(core: Tokenizer, texts: Sequence[str], special: Sequence[str]) -> None:
    every_byte = [f"<0x{number:02X}>" for number in range(256)]
    tokens = list(dict.fromkeys(["<unk>", *special, *every_byte]))
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=tokens, show_progress=False)
    core.train_from_iterator(texts, trainer)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def whole_words() -> Tokenizer:
    """As BERT: whitespace is dropped."""
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    return core


CORES = {
    "byte level": byte_level,
    "trimmed": trimmed_byte_level,
    "metaspace": metaspace,
    "metaspace first": metaspace_first,
    "whole words": whole_words,
}


def make_tokenizer(
    template: str | None = None,
    *,
    core: str = "byte level",
    eos: str | None = "</s>",
    bos: str | None = None,
    around: str | None = None,
) -> PreTrainedTokenizerBase:
    """Return a tokenizer.

    Args:
        template: its chat template.
        core: a key of CORES.
        eos: its end token.
        bos: its beginning token.
        around: what it puts around a text, such as `<s> $A </s>`.
    """
    fast = CORES[core]()
    fast.add_tokens(TAGS)
    if around is not None:
        marks = [part for part in around.split() if part != "$A"]
        fast.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(mark, fast.token_to_id(mark)) for mark in marks]
        )
    special = {"eos_token": eos, "bos_token": bos}
    given = {name: token for name, token in special.items() if token is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **given)
    tokenizer.chat_template = template
    return tokenizer
