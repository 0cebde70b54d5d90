"""Loads a registered version for mlflow.pyfunc, whose MLmodel file names this module.

model = mlflow.pyfunc.load_model("models:/NAME@champion")
model.predict(["a prompt"])
model.predict(DataFrame({"messages": [[{"role": "user", "content": "a prompt"}]]}))
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.adapter.json_files import WEIGHTS, read_identity
from lora_core.files import sha256_of_file
from pipelines.data.conversation import Message
from pipelines.data.schemas.roles import find_role
from pipelines.errors import PipelineError, RegistryError
from pipelines.paths import runs_root
from pipelines.workflow.answering import AnsweringModel, Prompt, load_answering_model

COLUMNS = (0, "prompt", "messages")
"""Names of the column with the prompts; MLflow makes a column 0 of a list."""
HOW_TO_CALL = (
    "give a list of texts, or a table with one column `prompt` (texts) or `messages` (lists of "
    "{role, content})"
)


class AdapterPredictor:
    """An adapter on its base, with the interface that mlflow.pyfunc expects."""

    def __init__(self, model: AnsweringModel) -> None:
        """Wrap a model that is in memory."""
        self._model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return the greedy answer to each prompt.

        Args:
            model_input: a pandas table, as MLflow makes it of what its user gives.
            params: max_new_tokens, the maximum length of an answer.

        Raises:
            PipelineError: the table has other columns or values.
        """
        from pipelines.tracking.mlmodel import MAX_NEW_TOKENS

        limit = int((params or {}).get("max_new_tokens", MAX_NEW_TOKENS))
        if limit < 1:
            raise PipelineError(f"max_new_tokens is {limit}, and must be at least 1")
        return self._model.answers(prompts_in(model_input), limit)


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> AdapterPredictor:
    """Verify a version's files, and load its adapter over its base.

    Args:
        path: folder of the files.
        model_config: `base`, which replaces the base's id, such as by its folder on this host, and
            `trust_remote_code`.

    Raises:
        RegistryError: the files are not those that were registered.
        BaseMismatchError: the base is not the one that the adapter was trained on.
    """
    config = model_config or {}
    folder = Path(path)
    _verify(folder)
    model = load_answering_model(
        folder,
        base=str(config.get("base") or "") or None,
        runs=runs_root(),
        trust_remote_code=config.get("trust_remote_code") is True,
    )
    return AdapterPredictor(model)


def _verify(folder: Path) -> None:
    """Compare a version's files with the registry and with each other."""
    from pipelines.tracking.downloaded import check_downloaded
    from pipelines.tracking.mlmodel import MLMODEL, read_references

    check_downloaded(folder)
    stated = read_references(folder)
    identity = read_identity(folder) or {}
    found = {
        "weights": sha256_of_file(folder / WEIGHTS),
        "weights in the sidecar": identity.get("adapter_sha256"),
        "base": identity.get("base"),
        "fingerprints of the base": identity.get("base_digests"),
    }
    expected = {
        "weights": stated.adapter_sha256,
        "weights in the sidecar": stated.adapter_sha256,
        "base": stated.base,
        "fingerprints of the base": stated.base_fingerprints,
    }
    for what, value in expected.items():
        if found[what] != value:
            raise RegistryError(
                f"{folder} has other {what} than its {MLMODEL} file states; do not use it, and "
                "download the version again"
            )


def prompts_in(table: Any) -> list[Prompt]:
    """Return the prompts in a pandas table.

    Raises:
        PipelineError: the table has other columns or values.
    """
    columns = list(table.columns)
    if len(columns) != 1 or columns[0] not in COLUMNS:
        shown = ", ".join(map(repr, columns))
        raise PipelineError(f"the input has the columns {shown or 'none'}; {HOW_TO_CALL}")
    return [_prompt(value) for value in table[columns[0]]]


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    is_list = not isinstance(value, dict) and hasattr(value, "__len__") and len(value) > 0
    if not is_list:
        raise PipelineError(f"{str(value)[:60]!r} is not a prompt; {HOW_TO_CALL}")
    return [_message(one) for one in value]


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping) or set(value) != {"role", "content"}:
        raise PipelineError(f"{str(value)[:60]!r} is not a message; {HOW_TO_CALL}")
    role = find_role(value["role"], {})
    if role is None or role == "call" or not isinstance(value["content"], str):
        raise PipelineError(
            f"{str(value)[:60]!r} is not a message with one of the roles system, user, assistant "
            f"and tool, and a text; {HOW_TO_CALL}"
        )
    return Message(role, value["content"])
