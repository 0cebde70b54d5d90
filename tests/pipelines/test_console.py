"""Progress reaches the terminal and Prefect: now and then, with the last row, and whether the server answers or not."""

import logging
import time
from collections.abc import Iterator
from io import StringIO
from typing import Any
from uuid import UUID, uuid4

import pytest
from rich.console import Console

from pipelines import console
from pipelines.console import Row, Throttled, fan_out
from pipelines.orchestration import flow_log
from pipelines.orchestration.cancellation import FLOW_RUN
from pipelines.orchestration.flow_log import log_for_pages_only, reported, tell

ARTIFACT = uuid4()


def row(step: int) -> Row:
    return {"step": step, "steps": 4, "loss": 2.5, "tokens": 100, "seconds": 0.5}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(flow_log, "say", lambda text, **_: lines.append(text))
    return lines


@pytest.fixture
def log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(flow_log, "get_run_logger", lambda: logging.getLogger("run"))
    with caplog.at_level(logging.INFO, "run"):
        yield caplog


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """Return what is drawn on a stand-in of the page."""
    drawn: list[tuple[float, str]] = []

    def create(percent: float, description: str) -> UUID:
        assert not drawn
        drawn.append((percent, description))
        return ARTIFACT

    def update(artifact: UUID, percent: float, description: str) -> None:
        assert artifact == ARTIFACT
        drawn.append((percent, description))

    monkeypatch.setattr(flow_log, "create_progress_artifact", create)
    monkeypatch.setattr(flow_log, "update_progress_artifact", update)
    monkeypatch.setattr(flow_log, "SECONDS_BETWEEN_BARS", 0.01)
    return drawn


def test_rows_are_passed_on_to_all() -> None:
    first: list[Row] = []
    second: list[Row] = []
    fan_out(first.append, second.append)(row(1))
    assert first == second == [row(1)]


def test_the_first_and_the_last_row_are_shown_and_few_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Row] = []
    paced, clock = Throttled(shown.append), iter([0.0, 0.0, 1.0, 20.0, 20.0, 21.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    for step in (1, 2, 3, 4):
        paced(row(step))
    assert [one["step"] for one in shown] == [1, 3, 4]


def test_a_training_is_seen_on_its_page(
    log: pytest.LogCaptureFixture, bars: list[tuple[float, str]]
) -> None:
    with reported("rank-2") as watch:
        watch(row(1))
        while not bars:
            time.sleep(0.01)
        watch(row(4))
    assert bars == [
        (25, "rank-2: step 1/4, loss 2.500, 200 tokens/s, 2 s left"),
        (100, "rank-2: step 4/4, loss 2.500, 200 tokens/s, 0 s left"),
    ]
    assert [record.message for record in log.records] == [text for _, text in bars]


def test_a_page_that_cannot_be_drawn_is_said_once(
    log: pytest.LogCaptureFixture, bars: object, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def away(*_: object, **__: object) -> UUID:
        asked.append(None)
        raise ConnectionError("refused")

    monkeypatch.setattr(flow_log, "create_progress_artifact", away)
    with reported("rank-2") as watch:
        watch(row(1))
        while len(asked) < 3:
            time.sleep(0.01)
    assert len(said) == 1 and "ConnectionError: refused" in said[0]


def test_a_page_that_hangs_holds_nobody_up(
    log: pytest.LogCaptureFixture, bars: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_log, "create_progress_artifact", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(flow_log, "SECONDS_TO_FINISH", 0.1)
    begun = time.monotonic()
    with reported("rank-2") as watch:
        watch(row(4))
    assert time.monotonic() - begun < 3


def test_a_stall_is_told_to_both_and_under_a_worker_once(
    log: pytest.LogCaptureFixture, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell("rank 1 waits [Errno 11] [/tmp/lock]")  # brackets are no markup
    monkeypatch.setenv(FLOW_RUN, "a run")
    tell("rank 2 waits")
    assert [record.message for record in log.records] == [
        "rank 1 waits [Errno 11] [/tmp/lock]",
        "rank 2 waits",
    ]
    assert said == ["rank 1 waits [Errno 11] [/tmp/lock]"]


@pytest.mark.parametrize(
    "text", ["rank-4 in [/tmp/runs]: [Errno 5] [bold] [parameters: 1]", "word " * 40 + "end"]
)
def test_a_line_is_printed_as_it_is_and_whole(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    written = StringIO()
    monkeypatch.setattr(console, "console", Console(file=written, width=80))
    console.say(text, mark="✗", aside=text)
    assert written.getvalue() == f"✗ {text} {text}\n"


def test_runs_log_to_pages_and_not_to_the_terminal() -> None:
    logger = logging.getLogger("prefect.task_runs")
    before = logger.level, logger.propagate
    try:
        log_for_pages_only()
        assert logger.isEnabledFor(logging.INFO) and not logger.propagate
    finally:
        logger.level, logger.propagate = before
        logging.getLogger("prefect.flow_runs").propagate = True
