"""The end of a run: the report, the registry, the table; and what they need, checked first.

A failure at the end loses nothing that was trained or scored.
"""

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_core.files import write_text
from pipelines.config.alias_names import PROPOSED
from pipelines.config.experiments import rank_experiments
from pipelines.console import print_status, print_table
from pipelines.data.data_warnings import data_markdown
from pipelines.errors import RegistryError, UnreachableError
from pipelines.orchestration.events import announce_result
from pipelines.orchestration.links import flow_run_reference
from pipelines.tracking.retry import retry_until_reachable
from pipelines.workflow import tasks
from pipelines.workflow.run import PipelineRun
from pipelines.workflow.run_origin import run_origin

if TYPE_CHECKING:
    from pipelines.comparison.document import Registered, Summary
    from pipelines.runtime.interfaces.plan_result import PlanResult
    from pipelines.runtime.interfaces.results import BaseResult

Answer = TypeVar("Answer")


def check_access(run: PipelineRun) -> None:
    """Check that this user can register adapters; continue if the server is away for now.

    Raises:
        RecipeError: the name of the experiment cannot be used.
        RegistryError: the registry or its store of files refuses.
    """
    from pipelines.tracking import preflight

    registry = run.recipe.registry
    experiment = registry.experiment or run.recipe.name
    try:
        preflight.check_access(registry.model, experiment, run.stages.root)
    except UnreachableError as error:
        print_status(f"{error}; the run trains now, and registers at its end", mark="…")


def check_adapter_sizes(run: PipelineRun, base: "BaseResult", plan: "PlanResult") -> None:
    """Raise RecipeError if an adapter would be too large for the registry."""
    from pipelines.tracking import preflight

    labels = [experiment.label for experiment in rank_experiments(run.recipe)]
    sizes = {label: plan.runs[label].file_bytes for label in labels}
    preflight.check_adapter_sizes(sizes, base.weights)


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
    details = data_markdown(summary.data, summary.data_warnings)
    tasks.show_comparison(f"{note}\n{details}", summary.decision, recipe=summary.name)
    print_status("")
    print_table(terminal_table(summary))
    page, path = paths(run)
    print_status(f"report   {page}\nsummary  {path}")
    if registered is not None and registered.page:
        print_status(f"ranks    {registered.page}")
    if registered is not None and PROPOSED in registered.aliases:
        print_status(how_to_decide(registered))
    if failure is not None:
        raise failure
    if registered is not None:
        announce_result(summary, registered)
    return path


def how_to_decide(registered: "Registered") -> str:
    """Return how a person decides about the proposed version."""
    reference = shlex.quote(f"{registered.model}@{PROPOSED}")
    return (
        f"version {registered.aliases[PROPOSED]} of {registered.model} is proposed as champion: "
        f'lora registry promote {reference} --reason "…", or reject it with the same arguments'
    )


def paths(run: PipelineRun) -> tuple[Path, Path]:
    """Return the paths of a run's page and summary."""
    return run.folder / "report.html", run.folder / "summary.json"


def write_report(run: PipelineRun, summary: "Summary") -> str:
    """Write the page, and the summary with the times so far.

    Returns:
        The table in Markdown, with the origin of the run and the links to its pages.
    """
    from pipelines.reporting.report import markdown_table, write_html

    page, path = paths(run)
    times = {"stages": tuple(run.timings), "seconds": run.seconds}
    summary = summary.model_copy(update=times)
    write_text(path, summary.model_dump_json(indent=2) + "\n")
    origin = run_origin(run, summary.registered)
    write_html(summary, page, origin)
    return f"{markdown_table(summary)}\n{origin.markdown()} · report `{page}`\n"


def register(run: PipelineRun, summary: "Summary", note: str) -> "Registered":
    """Register the adapters; return their versions."""
    from pipelines.tracking import registry

    return registry.register(
        summary, run.stages.root, list(paths(run)), note, flow_run_reference(run.flow_run)
    )


def describe(run: PipelineRun, registered: "Registered", note: str) -> None:
    """Add the registered versions to the comparison's run in the registry."""
    from pipelines.tracking import registry

    registry.describe(
        registered, run.stages.root, list(paths(run)), note, flow_run_reference(run.flow_run)
    )


def _attempt(action: Callable[[], Answer]) -> tuple[Answer | None, RegistryError | None]:
    """Call the registry; return its answer or its error."""
    try:
        return retry_until_reachable(action), None
    except RegistryError as error:
        return None, error
