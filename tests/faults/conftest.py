"""One site for all trials of a file, and the same random steps in every run."""

from collections.abc import Iterator
from random import Random

import pytest

from faults.trial import Site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site.prepared(tmp_path_factory.mktemp("faults")) as site:
        yield site


@pytest.fixture(scope="module")
def random() -> Random:
    return Random(7)
