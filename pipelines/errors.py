"""What a user of the pipeline can get wrong; each message holds the value, the rule and what to do."""

import json
from pathlib import Path

from lora_core.files import write_json

ERROR_FILE = "error.json"


class PipelineError(Exception):
    """Base of every error that is the user's to mend; the command line prints its text alone."""


class RecipeError(PipelineError, ValueError):
    """A recipe that cannot be honoured."""


class DataError(PipelineError, ValueError):
    """Data that is missing, malformed, or empty after preparation."""


class BaseModelError(PipelineError, ValueError):
    """A base model that cannot be found or read."""


class DivergenceError(PipelineError, ArithmeticError):
    """A training whose loss is no longer finite."""


class MemoryExceededError(PipelineError, MemoryError):
    """A step that needs more memory than there is."""


class PeerError(PipelineError, ConnectionError):
    """A rank that ended, or does not answer in time."""


class EndedError(PipelineError, RuntimeError):
    """A process that was ended from outside, or for want of memory."""


class StageError(PipelineError, RuntimeError):
    """A stage ended without a result."""

    def __init__(self, message: str, kind: str = "") -> None:
        """Keep what the stage said, and the name of the error that it ended with; empty where it left none."""
        super().__init__(message)
        self.kind = kind


class RegistryError(PipelineError, RuntimeError):
    """The tracking server refused or did not answer; nothing trained is lost."""


class UnreachableError(RegistryError):
    """A server does not answer at all, MLflow's or Prefect's; it may in a while."""


def no_space(where: object) -> str:
    """Return what is said of a disk that is full; `where` is a file or folder on it."""
    return (
        f"no space left on the disk of {where}; free some and run again, what is finished is kept"
    )


def record_error(folder: Path, error: Exception) -> None:
    """Leave the error's text in a stage's folder, where the parent process finds it.

    That a peer is gone is no news where a rank has left its own error: it went because of that.
    """
    if isinstance(error, PeerError) and (folder / ERROR_FILE).is_file():
        return
    write_json(folder / ERROR_FILE, {"type": type(error).__name__, "message": str(error)})


def recorded_error(folder: Path) -> StageError | None:
    """Return the error that a child process left, if any."""
    path = folder / ERROR_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    return StageError(values["message"], values["type"])
