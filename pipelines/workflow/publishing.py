"""The end of a run: the report, the registry, the table. What fails here loses nothing of what was trained and scored."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core.files import write_text
from pipelines.console import print_status, show
from pipelines.errors import RegistryError
from pipelines.tracking.retry import until_it_answers
from pipelines.workflow import tasks
from pipelines.workflow.run import Run


def publish(run: Run, summary: dict[str, Any]) -> Path:
    """Write the report, register the adapters, write again what they are registered as, and show the table.

    Raises:
        RegistryError: the registry failed; the report is written and shown, and running again registers what is missing.
    """
    from pipelines.reporting.report import terminal_table

    note = write_report(run, summary)  # before the registry is asked, which may fail
    begun = time.monotonic()
    failure = _attempt(lambda: register(run, summary, note))
    run.note("register", begun)
    note = write_report(run, summary)
    failure = failure or _attempt(lambda: describe(run, summary, note))
    tasks.show_comparison(note, summary["decision"])
    print_status("")
    show(terminal_table(summary))
    page, path = paths(run)
    print_status(f"report   {page}\nsummary  {path}")
    if failure is not None:
        raise failure
    return path


def paths(run: Run) -> tuple[Path, Path]:
    """Return where the page and the summary of a run lie."""
    return run.folder / "report.html", run.folder / "summary.json"


def write_report(run: Run, summary: dict[str, Any]) -> str:
    """Write the summary with the times so far, and the page; return the note for other pages, in Markdown."""
    from pipelines.reporting.report import markdown_table, write_html

    page, path = paths(run)
    summary |= run.times()
    write_text(path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_html(summary, page)
    return markdown_table(summary)


def register(run: Run, summary: dict[str, Any], note: str) -> None:
    """Register the adapters and put into the summary what they are registered as."""
    from pipelines.tracking import registry

    summary["registered"] = registry.register(summary, run.stages.root, list(paths(run)), note)


def describe(run: Run, summary: dict[str, Any], note: str) -> None:
    """Let the comparison's run in the registry say what is registered."""
    from pipelines.tracking import registry

    registry.describe(summary["registered"], run.stages.root, list(paths(run)), note)


def _attempt(act: Callable[[], None]) -> RegistryError | None:
    """Do something with the registry; return what it refused."""
    try:
        until_it_answers(act)
    except RegistryError as error:
        return error
    return None
