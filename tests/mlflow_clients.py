"""What MLflow's clients keep of a server, in the process and in its environment."""

import os
import sys


def reset_mlflow_clients() -> None:
    """Let no later test use the servers of an earlier one."""
    mlflow = sys.modules.get("mlflow")
    if mlflow is None:
        return
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)
    # MLflow writes both URIs into the environment but does not remove them
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)
