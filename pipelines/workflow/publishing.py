"""The end of a run: the report, the registry, the table.

A failure here loses nothing that was trained or scored.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_core.files import write_text
from pipelines.console import print_status, print_table
from pipelines.errors import RegistryError
from pipelines.tracking.retry import retry_until_reachable
from pipelines.workflow import tasks
from pipelines.workflow.run import PipelineRun

if TYPE_CHECKING:
    from pipelines.comparison.document import Registered, Summary

Answer = TypeVar("Answer")


def publish(run: PipelineRun, summary: "Summary") -> Path:
    """Write the report, register the adapters, add their versions to it, and print the table.

    Raises:
        RegistryError: the registry failed. The report is written and the table printed, and running
            again registers what is missing.
    """
    from pipelines.reporting.report import terminal_table

    note = write_report(run, summary)  # before the registry is called, which may fail
    started = time.monotonic()
    registered, failure = _attempt(lambda: register(run, summary, note))
    run.record("register", time.monotonic() - started)
    summary = summary.model_copy(update={"registered": registered})
    note = write_report(run, summary)
    if registered is not None:
        _, failure = _attempt(lambda: describe(run, registered, note))
    tasks.show_comparison(note, summary.decision)
    print_status("")
    print_table(terminal_table(summary))
    page, path = paths(run)
    print_status(f"report   {page}\nsummary  {path}")
    if failure is not None:
        raise failure
    return path


def paths(run: PipelineRun) -> tuple[Path, Path]:
    """Return the paths of a run's page and summary."""
    return run.folder / "report.html", run.folder / "summary.json"


def write_report(run: PipelineRun, summary: "Summary") -> str:
    """Write the page, and the summary with the times so far; return the table in Markdown."""
    from pipelines.reporting.report import markdown_table, write_html

    page, path = paths(run)
    times = {"stages": tuple(run.timings), "seconds": run.seconds}
    summary = summary.model_copy(update=times)
    write_text(path, summary.model_dump_json(indent=2) + "\n")
    write_html(summary, page)
    return markdown_table(summary)


def register(run: PipelineRun, summary: "Summary", note: str) -> "Registered":
    """Register the adapters; return their versions."""
    from pipelines.tracking import registry

    return registry.register(summary, run.stages.root, list(paths(run)), note)


def describe(run: PipelineRun, registered: "Registered", note: str) -> None:
    """Add the registered versions to the comparison's run in the registry."""
    from pipelines.tracking import registry

    registry.describe(registered, run.stages.root, list(paths(run)), note)


def _attempt(action: Callable[[], Answer]) -> tuple[Answer | None, RegistryError | None]:
    """Call the registry; return its answer or its error."""
    try:
        return retry_until_reachable(action), None
    except RegistryError as error:
        return None, error
