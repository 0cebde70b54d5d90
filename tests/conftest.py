"""The order of the tests, the longest files first, so that several workers end at about the same time; and no GPU for them."""

import os

import pytest

os.environ.setdefault(
    "LORA_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all")
)  # what tests marked gpu may use
os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # before torch looks: the others hold what is true on a CPU, on every machine
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what is marked slow before the rest; each part keeps its order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
