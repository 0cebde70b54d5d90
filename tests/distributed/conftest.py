"""One set of tiny trainings for the tests of this room, and each of them by one process, which the others are held against."""

import pytest

from distributed.trainings import METHODS, Trainings, train_all
from pipelines.runtime.stage import Stage


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings.prepare(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="session")
def alone(trainings: Trainings) -> dict[str, Stage]:
    """Every method by one process."""
    stages = {method: trainings.stage(method, "alone") for method in METHODS}
    train_all(
        "cpu_single",
        1,
        [str(stage.folder) for stage in stages.values()],
        trainings.root / "alone.log",
    )
    return stages
