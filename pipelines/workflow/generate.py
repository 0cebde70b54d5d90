"""Answer a prompt with an adapter from a folder or the registry, on the base of its sidecar."""

import tempfile
from pathlib import Path

from pipelines.config.registry_names import REGISTERED
from pipelines.workflow.answering import load_answering_model


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
        model = load_answering_model(
            folder, base=base, runs=runs, trust_remote_code=trust_remote_code
        )
    [text] = model.answers([prompt], max_new_tokens)
    return text


def _fetch(adapter: str, runs: Path, scratch: Path) -> Path:
    if adapter.startswith(REGISTERED):
        from pipelines.tracking.registry import download

        return download(adapter, runs, scratch)
    return Path(adapter)
