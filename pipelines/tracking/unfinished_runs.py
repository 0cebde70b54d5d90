"""The runs of a comparison whose registration fails are not left as if they were in progress."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError


@contextmanager
def mark_failed(client: MlflowClient) -> Iterator[list[str]]:
    """End runs that are in progress as FAILED if the block raises.

    Repeating the registration continues them and ends them as FINISHED.

    Args:
        client: of the tracking server.

    Yields:
        A list to which the block adds the ids of its runs.
    """
    runs: list[str] = []
    try:
        yield runs
    except BaseException:
        with suppress(MlflowException, SQLAlchemyError, OSError):  # the server may be away
            _end(client, runs)
        raise


def _end(client: MlflowClient, runs: Sequence[str]) -> None:
    for run in runs:
        if client.get_run(run).info.status == "RUNNING":
            client.set_terminated(run, "FAILED")
