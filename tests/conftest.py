"""Order the tests, slow ones first, so that workers end at about the same time; hide GPUs."""

import os

import pytest

# GPUs for tests marked gpu.
os.environ.setdefault("LORA_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
# All other tests run on the CPU on every machine. Set before torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# No test runs MLflow's background jobs, whose workers would take the cores of the others.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests marked slow before the rest; each group keeps its order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
