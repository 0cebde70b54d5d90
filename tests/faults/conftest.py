"""One site for all trials of a file, and the same random steps every time."""

from random import Random

import pytest

from faults.trial import Site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def random() -> Random:
    return Random(7)
