"""Errors that a user can fix; each message contains the value, the rule and the fix."""

import json
import re
from pathlib import Path

from lora_core.files import write_json

ERROR_FILE = "error.json"
USER = re.compile(r"(?<=://)(?:[^/\s]*@|[^/:@\s]*:(?!\d+/)[^@\s]*@)")
"""The user name and password of an address."""
SECRET_ARGUMENT = re.compile(
    r"(?i)(?<=[?&;])((?:ssl)?password|passwd|pwd|token|access_token|secret|sig|signature"
    r"|x-amz-signature|x-amz-security-token)=[^&;\s'\"]+"
)
"""A secret in the query of an address."""


class PipelineError(Exception):
    """Base of all errors that the user can fix; the command line prints only its text.

    Addresses in it have no credentials: Prefect stores the text of an error that ends a run.
    """

    def __init__(self, message: object = "") -> None:
        """Store the message."""
        super().__init__(without_credentials(str(message)))


class RecipeError(PipelineError, ValueError):
    """An invalid recipe."""


class DataError(PipelineError, ValueError):
    """Data that is missing, malformed, or empty after preparation."""


class BaseModelError(PipelineError, ValueError):
    """A base model that cannot be found or read."""


class DivergenceError(PipelineError, ArithmeticError):
    """The loss of a training is no longer finite."""


class MemoryExceededError(PipelineError, MemoryError):
    """A step needs more memory than is available."""


class PeerError(PipelineError, ConnectionError):
    """A rank has ended, or does not answer in time."""


class EndedError(PipelineError, RuntimeError):
    """A process was ended from outside, or because memory ran out."""


class StageError(PipelineError, RuntimeError):
    """A stage ended without a result."""

    def __init__(self, message: str, kind: str = "") -> None:
        """Store the stage's message and the name of its error type; empty if it recorded none."""
        super().__init__(message)
        self.kind = kind


class RegistryError(PipelineError, RuntimeError):
    """The tracking server refused or did not answer; no trained weights are lost."""


class UnreachableError(RegistryError):
    """MLflow's or Prefect's server does not answer at all; it may answer later."""


def one_line(error: BaseException, *, with_type: bool = True, limit: int | None = None) -> str:
    """Return the type of an error and the first line of its text, such as `ValueError: bad header`.

    Addresses in it have no credentials.

    Args:
        error: any exception.
        with_type: if False, return the text alone, or the type if the text is empty.
        limit: maximum number of characters of the text.
    """
    name = type(error).__name__
    lines = str(error).strip().splitlines()
    if not lines:
        return name
    text = without_credentials(lines[0])[:limit]
    return f"{name}: {text}" if with_type else text


def without_credentials(text: str) -> str:
    """Return a text with addresses, without the user names, passwords and tokens in them."""
    return SECRET_ARGUMENT.sub(r"\1=***", USER.sub("", text))


def no_space(where: object) -> str:
    """Return the message for a full disk; `where` is a file or folder on it."""
    return (
        f"no space left on the disk of {where}; free some and run again, finished stages are kept"
    )


def record_error(folder: Path, error: Exception) -> None:
    """Write the error to a stage's folder for the parent process.

    A lost peer is not recorded over another rank's own error, which is the cause.
    """
    if isinstance(error, PeerError) and (folder / ERROR_FILE).is_file():
        return
    message = without_credentials(str(error))
    write_json(folder / ERROR_FILE, {"type": type(error).__name__, "message": message})


def recorded_error(folder: Path) -> StageError | None:
    """Return the error that a child process recorded, if any."""
    path = folder / ERROR_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    return StageError(values["message"], values["type"])
