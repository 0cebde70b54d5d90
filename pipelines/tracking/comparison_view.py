"""MLflow's page with the ranks of a comparison in a table, saved as a view of the experiment.

A view is what MLflow's button "Share" saves: a tag on the experiment with the state of the page.
The addresses select MLflow's pages for the training of models; its home page shows chats.
"""

import json
from urllib.parse import urlencode

from mlflow import MlflowClient

from pipelines.errors import without_credentials
from pipelines.tracking.runs import ADAPTER, KIND_TAG

VIEW_TAG = "mlflow.sharedViewState."
"""On the experiment, followed by the key of the view."""
WORKFLOW = {"workflowType": "machine_learning"}
COLUMNS = ("params.`lora.r`", "tags.`verdict`", "metrics.`task/gain`", "metrics.`general/change`")
"""MLflow's names of the columns: rank, verdict, gain, general change."""


def save_rank_view(client: MlflowClient, experiment: str, parent_run: str) -> None:
    """Save the view of a comparison's ranks: adapters only, the highest rank first.

    Args:
        client: of the tracking server.
        experiment: id of the experiment.
        parent_run: id of the comparison's run; the key of the view.
    """
    ranks = f"tags.`{KIND_TAG}` = '{ADAPTER}' AND tags.`mlflow.parentRunId` = '{parent_run}'"
    state = {
        "searchFilter": ranks,
        "orderByKey": "metrics.`task/gain`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "groupBy": None,
    }
    client.set_experiment_tag(experiment, f"{VIEW_TAG}{parent_run}", json.dumps(state))


def rank_view(experiment: str, parent_run: str) -> str:
    """Return the address of the view of a comparison's ranks, relative to MLflow's pages."""
    query = urlencode({**WORKFLOW, "viewStateShareKey": parent_run})
    return f"#/experiments/{experiment}/runs?{query}"


def comparison_page(experiment: str, parent_run: str) -> str:
    """Return the address of a comparison's run, relative to MLflow's pages."""
    return f"#/experiments/{experiment}/runs/{parent_run}?{urlencode(WORKFLOW)}"


def on_server(uri: str, address: str) -> str:
    """Return the address of a page; empty if the store is not a server, and has no pages.

    Args:
        uri: of the tracking server.
        address: relative to its pages.
    """
    if not uri.startswith(("http://", "https://")):
        return ""
    return f"{without_credentials(uri).rstrip('/')}/{address}"
