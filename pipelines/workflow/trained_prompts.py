"""The tokenizer that an adapter was trained with, and how its answers end."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_core.adapter.json_files import read_identity
from pipelines.errors import PipelineError
from pipelines.models.tokenizer import load_tokenizer, template_digest

TOKENIZER_CONFIG = "tokenizer_config.json"
"""An adapter has one if the recipe changed the base's tokenizer."""


@dataclass(frozen=True)
class TrainedPrompts:
    """What formats prompts as in training."""

    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[int, ...]
    """Tokens that end an answer in the training data."""


def trained_prompts(adapter: Path, base: Path, *, trust_remote_code: bool) -> TrainedPrompts:
    """Return the tokenizer of an adapter's training, and its end tokens.

    Args:
        adapter: folder of the adapter.
        base: folder of the base.
        trust_remote_code: run the Python code that comes with the base.

    Raises:
        PipelineError: the chat template is not the one of the training.
    """
    own = adapter if (adapter / TOKENIZER_CONFIG).is_file() else base
    tokenizer = load_tokenizer(own, trust_remote_code=trust_remote_code)
    lineage = (read_identity(adapter) or {}).get("lineage", {})
    trained = str(lineage.get("template_sha256", ""))
    found = template_digest(tokenizer)
    if trained not in ("", found):
        raise PipelineError(
            f"{adapter} was trained with the chat template {trained[:12]}, and the tokenizer in "
            f"{own} has {found[:12]}; use the tokenizer of the base's revision that the adapter "
            "was trained with"
        )
    end_tokens = tuple(int(token) for token in str(lineage.get("end_tokens", "")).split())
    return TrainedPrompts(tokenizer, end_tokens)
