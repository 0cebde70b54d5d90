"""The order of the tests: the longest files first, so that several workers end at about the same time."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what is marked slow before the rest; each part keeps its order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
