"""Training stages, prepared once per file."""

import pytest
from training_stages import TrainingStages


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> TrainingStages:
    return TrainingStages.prepare(tmp_path_factory.mktemp("train"))
