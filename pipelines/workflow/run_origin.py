"""Who runs a recipe, when and where, with the pages of Prefect and MLflow about the same run."""

from datetime import UTC, datetime
from socket import gethostname
from typing import TYPE_CHECKING

from pipelines.orchestration.links import flow_run_reference
from pipelines.reporting.origin import PageLink, RunOrigin
from pipelines.runtime.stage import digest
from pipelines.workflow.run import PipelineRun

if TYPE_CHECKING:
    from pipelines.comparison.document import Registered


def run_origin(run: PipelineRun, registered: "Registered | None") -> RunOrigin:
    """Return where a run comes from.

    Args:
        run: at its end.
        registered: its registration, whose MLflow run is linked; None if there is none.
    """
    links = []
    flow_run = flow_run_reference(run.flow_run)
    if flow_run.page:
        links.append(PageLink("Prefect", flow_run.page))
    if registered is not None and registered.page:
        links.append(PageLink("MLflow", registered.page))
    from pipelines.tracking.lease import user_name

    return RunOrigin(
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        author=user_name(),
        host=gethostname(),
        recipe_digest=digest(run.recipe.model_dump(mode="json")),
        links=tuple(links),
    )
