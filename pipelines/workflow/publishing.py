"""The end of a run: the report, the registry, the table.

A failure here loses nothing that was trained or scored.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core.files import write_text
from pipelines.console import print_status, print_table
from pipelines.errors import RegistryError
from pipelines.tracking.retry import retry_until_reachable
from pipelines.workflow import tasks
from pipelines.workflow.run import PipelineRun


def publish(run: PipelineRun, summary: dict[str, Any]) -> Path:
    """Write the report, register the adapters, add their versions to it, and print the table.

    Raises:
        RegistryError: the registry failed. The report is written and the table printed, and running
            again registers what is missing.
    """
    from pipelines.reporting.report import terminal_table

    note = write_report(run, summary)  # before the registry is called, which may fail
    started = time.monotonic()
    failure = _attempt(lambda: register(run, summary, note))
    run.record("register", time.monotonic() - started)
    note = write_report(run, summary)
    if failure is None:
        failure = _attempt(lambda: describe(run, summary, note))
    tasks.show_comparison(note, summary["decision"])
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


def write_report(run: PipelineRun, summary: dict[str, Any]) -> str:
    """Write the page, and the summary with the times so far; return the table in Markdown."""
    from pipelines.reporting.report import markdown_table, write_html

    page, path = paths(run)
    summary |= run.times()
    write_text(path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_html(summary, page)
    return markdown_table(summary)


def register(run: PipelineRun, summary: dict[str, Any], note: str) -> None:
    """Register the adapters and add their versions to the summary."""
    from pipelines.tracking import registry

    summary["registered"] = registry.register(summary, run.stages.root, list(paths(run)), note)


def describe(run: PipelineRun, summary: dict[str, Any], note: str) -> None:
    """Add the registered versions to the comparison's run in the registry."""
    from pipelines.tracking import registry

    registry.describe(summary["registered"], run.stages.root, list(paths(run)), note)


def _attempt(action: Callable[[], None]) -> RegistryError | None:
    """Call the registry; return its error, if any."""
    try:
        retry_until_reachable(action)
    except RegistryError as error:
        return error
    return None
