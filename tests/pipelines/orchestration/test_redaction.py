"""Passwords and tokens in addresses do not reach errors, logs, recipes or messages."""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings
from webhook import SECRET_PATH, webhook

from pipelines.config.recipe import parse_recipe
from pipelines.console import console
from pipelines.errors import (
    PipelineError,
    RecipeError,
    RegistryError,
    StageError,
    one_line,
    record_error,
    recorded_error,
    without_credentials,
)
from pipelines.orchestration.events import notify
from pipelines.orchestration.redaction import (
    RemoveCredentials,
    errors_without_credentials,
    remove_credentials_from_log,
)

ADDRESSES = [
    ("http://anna:planted@mlflow.example:5000/api", "http://mlflow.example:5000/api"),
    ("postgresql://anna:planted/x@db.example/mlflow", "postgresql://db.example/mlflow"),
    ("postgresql+psycopg2://planted@db.example/mlflow", "postgresql+psycopg2://db.example/mlflow"),
    ("see 'https://x:planted@a.example' and", "see 'https://a.example' and"),
    ("https://a.example/f?token=planted&size=3", "https://a.example/f?token=***&size=3"),
    ("s3://bucket/f?X-Amz-Signature=planted", "s3://bucket/f?X-Amz-Signature=***"),
    ("mysql://db/x?user=a&password=planted", "mysql://db/x?user=a&password=***"),
]
UNCHANGED = [
    "http://127.0.0.1:5000/#/models/x@champion",
    "models:/pairs-tiny@champion",
    "sqlite:////home/anna/runs/mlflow.db",
    "s3://bucket/rows.jsonl",
    "mail anna@example.org about http://mlflow.example",
]


@pytest.mark.parametrize(("address", "expected"), ADDRESSES)
def test_credentials_are_removed_from_addresses(address: str, expected: str) -> None:
    assert without_credentials(address) == expected


@pytest.mark.parametrize("text", UNCHANGED)
def test_other_text_is_unchanged(text: str) -> None:
    assert without_credentials(text) == text


def test_errors_that_are_shown_or_stored_have_none(tmp_path: Path) -> None:
    error = RegistryError(f"no answer of {ADDRESSES[0][0]}")
    assert one_line(error) == f"RegistryError: no answer of {ADDRESSES[0][1]}"
    record_error(tmp_path, error)
    stored = recorded_error(tmp_path)
    assert str(stored) == f"no answer of {ADDRESSES[0][1]}"
    assert "planted" not in (tmp_path / "error.json").read_text()


def test_the_log_of_a_run_has_none_even_in_a_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_credentials_from_log()
    remove_credentials_from_log()
    logger = logging.getLogger("prefect.flow_runs")
    assert sum(isinstance(one, RemoveCredentials) for one in logger.filters) == 1
    monkeypatch.setattr(logger, "propagate", True)
    try:
        try:
            raise OSError(ADDRESSES[0][0])
        except OSError as cause:
            raise RegistryError("refused") from cause
    except RegistryError:
        with temporary_settings({PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"}):
            logger.exception("failed at %s", ADDRESSES[1][0])
    [record] = [one for one in caplog.records if "failed at" in one.getMessage()]
    text = logging.Formatter().format(record)
    assert "planted" not in text
    assert f"OSError: {ADDRESSES[0][1]}" in text
    assert f"failed at {ADDRESSES[1][1]}" in text


def test_the_error_that_ends_a_run_has_none() -> None:
    """Prefect stores its text as the message of the run's state."""
    assert str(StageError(f"log ends: {ADDRESSES[0][0]}")) == f"log ends: {ADDRESSES[0][1]}"
    with pytest.raises(PipelineError) as ended, errors_without_credentials():
        raise OSError(f"no answer of {ADDRESSES[0][0]}")
    assert str(ended.value).startswith("OSError: ")
    assert "planted" not in "".join(traceback.format_exception(ended.value))
    with pytest.raises(OSError, match="disk full"), errors_without_credentials():
        raise OSError("disk full")


def test_a_recipe_with_a_password_is_refused_without_showing_it(
    recipe_with: Callable[..., dict[str, Any]],
) -> None:
    values = recipe_with(data={"source": "https://anna:planted@data.example/rows.jsonl"})
    with pytest.raises(RecipeError, match=r"data\.source contains a password") as refused:
        parse_recipe(values)
    assert "planted" not in str(refused.value)


def test_a_failed_message_names_no_address() -> None:
    with webhook() as hook, console.capture() as first:
        notify(hook.url, "a new champion")
    assert hook.texts == ["a new champion"]
    assert first.get() == ""
    with webhook() as hook, console.capture() as shown:
        hook.status = 500
        notify(hook.url, "to a server that refuses")
        notify(hook.url.replace(SECRET_PATH, f":0{SECRET_PATH}"), "to an invalid address")
        notify("nowhere", "to no address")
    assert "(status 500)" in shown.get()
    assert shown.get().count("to the address for messages") == 3
    assert SECRET_PATH not in shown.get()
