"""The chat templates of real families that TRL ships, read from the installed package.

Their tokens are compared with TRL's, for a pair and for conversations with and without a system.
The tokenizer has the special tokens that a template writes.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import trl
from transformers import PreTrainedTokenizerBase

from dataset_checks.expectations import Row, messages
from dataset_checks.schema_cases import ASK, BRIEF, TALK, TELL, USER
from dataset_checks.tokenizer_kinds import byte_level
from dataset_checks.tool_cases import TOOL_WITH_PARAMETERS, tool_talk
from dataset_checks.trl_tokens import Split, our_splits, trl_splits
from pipelines.config.data_section import DataSection
from pipelines.data.preparation import tokenize
from pipelines.errors import DataError

FOLDER = Path(trl.__file__).parent / "chat_templates"
EOS_AND_BOS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
    "deepseek": ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "gemma": ("<eos>", "<bos>"),
    "glm4": ("<|endoftext|>", None),
    "gptoss": ("<|return|>", "<|startoftext|>"),
    "lfm2": ("<|im_end|>", "<|startoftext|>"),
    "llama3": ("<|eot_id|>", "<|begin_of_text|>"),
    "nemotron": ("<|im_end|>", None),
    "phi3": ("<|endoftext|>", None),
    "qwen": ("<|im_end|>", None),
}
"""Start of a file's name → the tokens of the family's tokenizer."""
OTHER_MODALITIES = ("vl", "vision")
SPECIAL_TOKEN = re.compile(
    r"<[|｜][^|｜<>]+[|｜]>|<[a-z]+_of_turn>|<bos>|<eos>|<BOS_TOKEN>|\[gMASK\]|<sop>"
    r"|<\|[a-z_]+>|<[a-z_]+\|>"
)
ENDS_DIFFER = {
    "glm4moe": "TRL learns no end of an answer",
    "gptoss": "given alone, an inner answer ends as the last one does",
    "phi3": "TRL also learns the EOS after the token that ends a turn",
}
"""Start of a file's name → why the tokens after an answer are not compared."""
REASONING = ("glm4moe", "nemotron", "qwen3.", "qwen3_5_think", "qwen3_6", "qwen3_8")
"""Starts of the names of files whose templates write the reasoning of an answer."""
THOUGHTFUL_ANSWER = {"role": "assistant", "content": TELL, "reasoning_content": "I look."}
ROWS: dict[str, Row] = {
    "pair": {"prompt": ASK, "completion": TELL},
    "talk": {"messages": messages(*TALK)},
    "system": {"messages": messages(BRIEF, *TALK)},
    "reasoning": {"messages": [*messages(USER), THOUGHTFUL_ANSWER]},
    "tools": {"messages": tool_talk({"box": 3}), "tools": [TOOL_WITH_PARAMETERS]},
}


def shipped_templates() -> list[Path]:
    """Return the templates of text models that are not adapted to training."""
    return [
        file
        for file in sorted(FOLDER.glob("*.jinja"))
        if file.name.startswith(tuple(EOS_AND_BOS))
        and not file.stem.endswith(("training", *OTHER_MODALITIES))
    ]


def rows_for(file: Path) -> dict[str, Row]:
    """Return the rows that a template can render."""
    template = file.read_text(encoding="utf-8")
    left_out = set()
    if "System role not supported" in template:
        left_out.add("system")
    if not re.search(r"\btools\b", template) or "tool_calls" not in template:
        left_out.add("tools")
    if not file.name.startswith(REASONING):
        left_out.add("reasoning")
    return {name: row for name, row in ROWS.items() if name not in left_out}


def template_difference(file: Path, row: Row) -> str:
    """Return how the tokens of a row differ from TRL's; empty if they do not."""
    tokenizer = _tokenizer_of(file)
    settings = DataSection(source="rows", max_tokens=4000, supervise_empty_thinking=True)
    try:
        ours = our_splits(list(tokenize([row], tokenizer, settings)), tokenizer)
    except DataError as error:
        return f"refused: {error}"
    theirs = trl_splits(row, tokenizer) or ()
    if file.name.startswith(tuple(ENDS_DIFFER)):
        ours, theirs = _without_ends(ours, tokenizer), _without_ends(theirs, tokenizer)
    if ours == theirs:
        return ""
    shown = [[tokenizer.decode(list(ids)) for ids in split] for split in (*ours, *theirs)]
    return f"ours and TRL's: {shown!r}"


def _tokenizer_of(file: Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a template and the special tokens in it."""
    template = file.read_text(encoding="utf-8")
    names = [name for name in EOS_AND_BOS if file.name.startswith(name)]
    eos, bos = EOS_AND_BOS[names[0]]
    named = [token for token in (eos, bos) if token is not None]
    special = sorted({*SPECIAL_TOKEN.findall(template), *named})
    tokenizer = byte_level(eos, bos, special=special)
    tokenizer.chat_template = template
    return tokenizer


def _without_ends(splits: Sequence[Split], tokenizer: PreTrainedTokenizerBase) -> tuple[Split, ...]:
    """Return the answers without the special tokens and the white space at their ends."""
    shortened = []
    for before, answer in splits:
        end = len(answer)
        while end and not tokenizer.decode([answer[end - 1]], skip_special_tokens=True).strip():
            end -= 1
        shortened.append((before, answer[:end]))
    return tuple(shortened)
