"""Order the tests, slow ones first, so that workers end at about the same time; hide GPUs."""

import os
from collections.abc import Iterator

import pytest
from mlflow_clients import reset_mlflow_clients

MAX_WORKERS = 8
"""Their number is limited by memory: a worker and its servers need 3 GB."""

# GPUs for tests marked gpu.
os.environ.setdefault("LORA_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
# All other tests run on the CPU on every machine. Set before torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Each worker uses one core: threads that wait for a core take time from the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test runs MLflow's background jobs, whose workers would take the cores of the others.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


def pytest_xdist_auto_num_workers() -> int:
    """Start three workers for two cores: tests with servers and processes often wait."""
    return min(MAX_WORKERS, (3 * len(os.sched_getaffinity(0)) + 1) // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests marked slow before the rest; each group keeps its order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="module")
def no_server_of_other_modules() -> Iterator[None]:
    """Reset MLflow's clients after each module."""
    yield
    reset_mlflow_clients()
