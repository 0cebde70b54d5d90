"""Answer a prompt with an adapter from a folder or the registry, on the base of its sidecar."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_core import load_adapter
from lora_core.adapter.adapter_files import read_identity
from pipelines.data.conversation import Message
from pipelines.data.rendering.templates import ChatTemplate
from pipelines.data.rendering.token_positions import SpecialTokens, TextEncoder
from pipelines.errors import PipelineError
from pipelines.evaluation.generation import generate
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model
from pipelines.models.tokenizer import load_tokenizer
from pipelines.runtime import launcher
from pipelines.workflow.stages import base_stage

REGISTERED = "models:/"
TOKENIZER_CONFIG = "tokenizer_config.json"
"""An adapter has one if the recipe changed the base's tokenizer."""


def answer(
    prompt: str,
    *,
    adapter: str,
    base: str | None,
    max_new_tokens: int,
    runs: Path,
    trust_remote_code: bool = False,
) -> str:
    """Return the greedy answer to `prompt`.

    Args:
        prompt: formatted with the base's chat template, if it has one.
        adapter: a folder, or `models:/NAME@ALIAS`.
        base: replaces the base that the sidecar names; its weights must be those that the adapter
            was trained on.
        max_new_tokens: maximum length of the answer.
        runs: folder of all runs.
        trust_remote_code: run the Python code that comes with the base.

    Raises:
        BaseMismatchError: the base is not the one that the adapter was trained on.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _fetch(adapter, runs, Path(scratch))
        identity = read_identity(folder) or {}
        prepared = _prepare_base(
            base or identity.get("base", ""),
            identity.get("revision"),
            runs,
            trust_remote_code=trust_remote_code,
        )
        quantization = str(identity.get("lineage", {}).get("quantization", "none"))
        model = load_model(prepared, quantization, detect(), trust_remote_code=trust_remote_code)
        load_adapter(model, folder)
        with_tokenizer = folder if (folder / TOKENIZER_CONFIG).is_file() else prepared
        tokenizer = load_tokenizer(with_tokenizer, trust_remote_code=trust_remote_code)
    tokens = _prompt_tokens(tokenizer, prompt)
    [generated] = generate(
        CheckedReader(model),
        tokenizer,
        [tokens],
        max_new_tokens,
        end_tokens=_end_tokens(identity),
    )
    return generated.text.strip()


def _end_tokens(identity: Mapping[str, Any]) -> list[int]:
    """Return the tokens that ended answers in the adapter's training data."""
    stored = str(identity.get("lineage", {}).get("end_tokens", ""))
    return [int(token) for token in stored.split()]


def _fetch(adapter: str, runs: Path, scratch: Path) -> Path:
    if adapter.startswith(REGISTERED):
        from pipelines.tracking.registry import download

        return download(adapter, runs, scratch)
    return Path(adapter)


def _prepare_base(base: str, revision: str | None, runs: Path, *, trust_remote_code: bool) -> Path:
    if not base:
        raise PipelineError(
            "the adapter does not name the base that it was trained on; name it with --base"
        )
    stage = base_stage(base, revision, runs, trust_remote_code=trust_remote_code)
    return Path(launcher.ensure_result(stage, threads=1).folder)


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of a prompt as in training."""
    if not tokenizer.chat_template:
        encoder = TextEncoder(tokenizer, SpecialTokens(tokenizer))
        return [*encoder.prefix, *encoder.ids(prompt)]
    text = ChatTemplate(tokenizer).render([Message("user", prompt)], opens_answer=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
