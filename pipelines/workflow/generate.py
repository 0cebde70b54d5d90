"""Answer a prompt with an adapter from a folder or from the registry, on the base that its sidecar names."""

import tempfile
from pathlib import Path
from typing import Any

from lora_core import load_adapter
from lora_core.adapter.adapter_files import read_identity
from pipelines.errors import PipelineError
from pipelines.evaluation.generation import generate
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model
from pipelines.models.tokenizer import load_tokenizer
from pipelines.runtime import launcher
from pipelines.workflow.stages import base_stage

REGISTERED = "models:/"


def answer(
    prompt: str,
    adapter: str,
    base: str | None,
    max_new_tokens: int,
    runs: Path,
    *,
    trust_remote_code: bool = False,
) -> str:
    """Return the greedy answer to `prompt`.

    Args:
        prompt: put into the base's chat template where it has one.
        adapter: a folder, or `models:/NAME@ALIAS`.
        base: replaces the base that the sidecar names; its weights must still be those of training.
        max_new_tokens: longest answer.
        runs: folder of all runs.
        trust_remote_code: run the Python code that comes with the base.

    Raises:
        BaseMismatchError: the base is not the one the adapter was trained on.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _fetch(adapter, runs, Path(scratch))
        identity = read_identity(folder)
        prepared = _prepared_base(
            base or (identity or {}).get("base", ""),
            (identity or {}).get("revision"),
            runs,
            trust_remote_code,
        )
        hardware = detect()
        model = load_model(
            prepared,
            str((identity or {}).get("lineage", {}).get("quantization", "none")),
            hardware,
            trust_remote_code=trust_remote_code,
        )
        load_adapter(model, folder)
    tokenizer = load_tokenizer(prepared, trust_remote_code=trust_remote_code)
    return generate(
        CheckedReader(model), tokenizer, [_prompt_tokens(tokenizer, prompt)], max_new_tokens
    )[0].text.strip()


def _fetch(adapter: str, runs: Path, scratch: Path) -> Path:
    if adapter.startswith(REGISTERED):
        from pipelines.tracking.registry import download

        return download(adapter, runs, scratch)
    return Path(adapter)


def _prepared_base(base: str, revision: str | None, runs: Path, trusted: bool) -> Path:
    if not base:
        raise PipelineError(
            "the adapter does not say which base it was trained on; name it with --base"
        )
    return Path(
        launcher.result_of(
            base_stage(base, revision, runs, trust_remote_code=trusted),
            "pipelines.models.base_model",
            threads=1,
        )["folder"]
    )


def _prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(prompt).input_ids)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)
