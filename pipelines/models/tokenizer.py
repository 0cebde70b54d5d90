"""Load a base's tokenizer without loading its model."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipelines.runtime.stage import digest

CHANGED_TOKENIZER = "tokenizer"
"""Folder, in a data stage, of a tokenizer with the recipe's chat template or end token."""


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`.

    Args:
        folder: of a base, or of a changed tokenizer.
        trust_remote_code: the base's own Python code may run.
    """
    quiet()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code
    )
    return tokenizer


def tokenizer_folder(base: Path, data: Path) -> Path:
    """Return the folder of the tokenizer: the prepared data's, if the recipe changed it.

    Args:
        base: folder of the base.
        data: folder of the prepared data.
    """
    changed = data / CHANGED_TOKENIZER
    return changed if changed.is_dir() else base


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the tokens and their ids."""
    return digest(sorted(tokenizer.get_vocab().items()))


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the chat template."""
    return digest(tokenizer.chat_template or "")


def quiet() -> None:
    """Keep the loaders' progress bars and notices about optional kernels out of the log."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
