"""The end of a run: the report, the registry, the table. What fails here loses nothing of what was trained and scored."""

import json
import time
from pathlib import Path
from typing import Any

from lora_core.files import write_text
from pipelines import tasks
from pipelines.errors import RegistryError
from pipelines.progress import say, show
from pipelines.run import Run


def publish(run: Run, summary: dict[str, Any]) -> Path:
    """Write the report, register the adapters, show the table; a registry that fails loses nothing but itself."""
    from pipelines.reporting.report import markdown_table, terminal_table, write_html

    path, page = run.folder / "summary.json", run.folder / "report.html"
    summary |= run.times()
    write_summary(path, summary)
    write_html(summary, page)
    note = markdown_table(summary)
    failure = register(run, summary, [path, page], note)
    summary |= run.times()
    write_summary(path, summary)
    tasks.show_comparison(note, summary["decision"])
    say("")
    show(terminal_table(summary))
    say(f"report   {page}\nsummary  {path}")
    if failure is not None:
        raise failure
    return path


def register(run: Run, summary: dict[str, Any], files: list[Path], note: str) -> RegistryError | None:
    """Register the adapters and put into the summary what they are registered as; return what the registry refused."""
    begun = time.monotonic()
    try:
        from pipelines.reporting import registry

        summary["registered"] = registry.register(summary, run.stages.root, files, note)
    except RegistryError as error:
        return error
    finally:
        run.note("register", begun)
    return None


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary with its models in the order of the report."""
    write_text(path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
