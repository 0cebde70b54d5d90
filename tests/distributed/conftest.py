"""Tiny trainings, and each of them by one process, with which the others are compared."""

import pytest

from distributed.trainings import METHODS, Trainings, train_all
from pipelines.runtime.stage import Stage


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings.prepare(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="session")
def alone(trainings: Trainings) -> dict[str, Stage]:
    """Return every method, trained by one process."""
    stages = {method: trainings.stage(method, "alone") for method in METHODS}
    train_all(
        "cpu_single",
        1,
        [str(stage.folder) for stage in stages.values()],
        trainings.root / "alone.log",
    )
    return stages
