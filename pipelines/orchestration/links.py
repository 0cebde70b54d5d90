"""Addresses of Prefect's pages."""

from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from pipelines.errors import without_credentials
from pipelines.orchestration.local_server import is_server_local
from pipelines.reporting.origin import FlowRunReference


def flow_run_reference(run: str) -> FlowRunReference:
    """Return a flow run, given by its id; without pages if the server is that of this run."""
    if is_server_local():
        return FlowRunReference(run)
    pages = PREFECT_UI_URL.value() or (PREFECT_API_URL.value() or "").removesuffix("/api")
    return FlowRunReference(run, without_credentials(pages))
