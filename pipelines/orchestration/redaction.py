"""What Prefect stores of a run contains no credentials: its log, and the error that ends it."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.errors import PipelineError, one_line, without_credentials

LOGGERS = ("prefect.flow_runs", "prefect.task_runs")


class RemoveCredentials(logging.Filter):
    """Removes user names, passwords and tokens from the addresses in a record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record's text and traceback; let every record pass."""
        record.msg = without_credentials(record.getMessage())
        record.args = ()
        if record.exc_info and record.exc_info[0] is not None:
            lines = traceback.format_exception(*record.exc_info)
            record.exc_text = without_credentials("".join(lines)).rstrip()
        return True


def remove_credentials_from_log() -> None:
    """Filter what runs log, from now on."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(one, RemoveCredentials) for one in logger.filters):
            logger.addFilter(RemoveCredentials())


@contextmanager
def errors_without_credentials() -> Iterator[None]:
    """Replace an error of the block whose text has credentials; Prefect stores it in the state.

    Raises:
        PipelineError: with the type and the first line of the other error, without credentials.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if without_credentials(text) == text:
            raise
        raise PipelineError(one_line(error)) from None
