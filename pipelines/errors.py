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


class StageError(PipelineError, RuntimeError):
    """A stage ended without a result."""


class RegistryError(PipelineError, RuntimeError):
    """The tracking server refused or did not answer; nothing trained is lost."""


def record_error(folder: Path, error: Exception) -> None:
    """Leave the error's text in a stage's folder, where the parent process finds it."""
    write_json(folder / ERROR_FILE, {"type": type(error).__name__, "message": str(error)})


def recorded_error(folder: Path) -> str | None:
    """Return the text a child process left, if any."""
    path = folder / ERROR_FILE
    return str(json.loads(path.read_text())["message"]) if path.is_file() else None
