"""Progress in the terminal and in Prefect, whether its server answers or not."""

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
from pipelines.orchestration.flow_log import log_and_print, log_for_pages_only, report_training

ARTIFACT = uuid4()


def row(step: int) -> Row:
    return {"step": step, "steps": 4, "loss": 2.5, "tokens": 100, "seconds": 0.5}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the lines that are printed."""
    lines: list[str] = []
    monkeypatch.setattr(flow_log, "print_status", lambda text, **_: lines.append(text))
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
    """Collect the states of the progress bar on a fake page."""
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


def test_fan_out_passes_rows_to_all() -> None:
    first: list[Row] = []
    second: list[Row] = []
    fan_out(first.append, second.append)(row(1))
    assert first == second == [row(1)]


def test_throttling_passes_the_first_and_the_last_row_and_few_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Row] = []
    throttled = Throttled(shown.append)
    clock = iter([0.0, 0.0, 1.0, 20.0, 20.0, 21.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    for step in (1, 2, 3, 4):
        throttled(row(step))
    assert [one["step"] for one in shown] == [1, 3, 4]


def test_every_row_with_an_evaluation_is_passed_and_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Row] = []
    throttled = Throttled(shown.append)
    monkeypatch.setattr(console.time, "monotonic", lambda: 1.0)
    for one in (row(1), row(2), row(3) | {"eval_loss": 2.75}):
        throttled(one)
    assert [one["step"] for one in shown] == [1, 3]
    line = console.progress_line("rank-2", shown[-1])
    assert "step 3/4, loss 2.500, held-out loss 2.750, " in line


def test_a_training_is_shown_on_its_page(
    log: pytest.LogCaptureFixture, bars: list[tuple[float, str]]
) -> None:
    with report_training("rank-2") as watch:
        watch(row(1))
        while not bars:
            time.sleep(0.01)
        watch(row(4))
    assert bars == [
        (25, "rank-2: step 1/4, loss 2.500, 200 tokens/s, 2 s left"),
        (100, "rank-2: step 4/4, loss 2.500, 200 tokens/s, 0 s left"),
    ]
    assert [record.message for record in log.records] == [text for _, text in bars]


def test_a_failing_page_is_reported_once(
    log: pytest.LogCaptureFixture,
    bars: object,
    printed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests: list[Any] = []

    def fail(*_: object, **__: object) -> UUID:
        requests.append(None)
        raise ConnectionError("refused")

    monkeypatch.setattr(flow_log, "create_progress_artifact", fail)
    with report_training("rank-2") as watch:
        watch(row(1))
        while len(requests) < 3:
            time.sleep(0.01)
    assert len(printed) == 1
    assert "ConnectionError: refused" in printed[0]


def test_a_hanging_page_does_not_block(
    log: pytest.LogCaptureFixture, bars: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_log, "create_progress_artifact", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(flow_log, "SECONDS_TO_FINISH", 0.1)
    started = time.monotonic()
    with report_training("rank-2") as watch:
        watch(row(4))
    assert time.monotonic() - started < 3


def test_a_stall_is_logged_and_printed_and_under_a_worker_only_logged(
    log: pytest.LogCaptureFixture, printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_and_print("rank 1 waits [Errno 11] [/tmp/lock]")  # brackets are not markup
    monkeypatch.setenv(FLOW_RUN, "a run")
    log_and_print("rank 2 waits")
    assert [record.message for record in log.records] == [
        "rank 1 waits [Errno 11] [/tmp/lock]",
        "rank 2 waits",
    ]
    assert printed == ["rank 1 waits [Errno 11] [/tmp/lock]"]


@pytest.mark.parametrize(
    "text", ["rank-4 in [/tmp/runs]: [Errno 5] [bold] [parameters: 1]", "word " * 40 + "end"]
)
def test_a_line_is_printed_verbatim_and_unbroken(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    written = StringIO()
    monkeypatch.setattr(console, "console", Console(file=written, width=80))
    console.print_status(text, mark="✗", aside=text)
    assert written.getvalue() == f"✗ {text} {text}\n"


def test_runs_log_to_pages_and_not_to_the_terminal() -> None:
    logger = logging.getLogger("prefect.task_runs")
    before = logger.level, logger.propagate
    try:
        log_for_pages_only()
        assert logger.isEnabledFor(logging.INFO)
        assert not logger.propagate
    finally:
        logger.level, logger.propagate = before
        logging.getLogger("prefect.flow_runs").propagate = True
