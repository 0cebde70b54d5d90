"""A trial is the beginning of a training, which continues from it as if it had never stopped."""

from dataclasses import replace
from typing import Any

import pytest
from tiny import save_pairs
from training_stages import ADAPTER_FILE, TrainingStages, losses_of

from pipelines.training.train import train
from pipelines.workflow.grid_search import continue_from
from pipelines.workflow.stages import TrainStage

pytestmark = pytest.mark.slow
STEPS = {"steps": 8}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> TrainingStages:
    """Training stages with enough rows for tuning examples."""
    prepared = TrainingStages.prepare(tmp_path_factory.mktemp("trials"))
    save_pairs(prepared.root / "pairs.jsonl", 200)
    return prepared


def adapter_bytes(stage: TrainStage) -> bytes:
    return (stage.folder / ADAPTER_FILE).read_bytes()


def train_in_parts(stages: TrainingStages, *parts: int, **changes: dict[str, Any]) -> TrainStage:
    """Train trials of increasing length, each from the one before, then the whole training."""
    before = None
    for first_steps in (*parts, None):
        stage = stages(2, "in parts", first_steps, **changes)
        continue_from(stage, before)
        train(stage.begin())
        before = stage
    assert before is not None
    return before


@pytest.mark.parametrize(
    "changes",
    [
        {"training": STEPS},
        {"training": STEPS, "lora": {"dropout": 0.2}},
        {"training": {**STEPS, "evaluate_every": 2}},
        {"training": {**STEPS, "evaluate_every": 1, "early_stopping_patience": 1}},
        {"training": STEPS, "lora": {"init": "pissa"}},
        {"training": {**STEPS, "checkpoint_every": 100}},
    ],
    ids=["plain", "dropout", "evaluated", "early stopping", "pissa", "no checkpoint between"],
)
def test_a_training_in_parts_gives_the_same_bytes(
    stages: TrainingStages, changes: dict[str, dict[str, Any]]
) -> None:
    alone = stages(2, "alone", **changes)
    train(alone.begin())
    in_parts = train_in_parts(stages, 3, 5, **changes)
    assert in_parts.key == alone.key
    assert adapter_bytes(in_parts) == adapter_bytes(alone)
    assert losses_of(in_parts) == losses_of(alone)


def test_a_trial_ends_after_its_steps_with_its_own_adapter(stages: TrainingStages) -> None:
    trial = stages(4, first_steps=3, training=STEPS)
    whole = stages(4, training=STEPS)
    assert trial.key != whole.key
    train(trial.begin())
    result = trial.result()
    assert result is not None
    assert result.totals.steps == len(losses_of(trial)) == 3
    assert (trial.folder / "checkpoints" / "step-00003").is_dir()
    train(whole.begin())
    assert losses_of(whole)[:3] == losses_of(trial)
    assert adapter_bytes(whole) != adapter_bytes(trial)
    assert not (whole.folder / "checkpoints").exists()


def test_a_training_with_a_checkpoint_of_its_own_keeps_it(stages: TrainingStages) -> None:
    trial = stages(4, first_steps=3, training=STEPS)
    if trial.result() is None:
        train(trial.begin())
    whole = stages(4, "kept", training=STEPS)
    own = whole.folder / "checkpoints" / "own"
    own.mkdir(parents=True)
    continue_from(whole, trial)
    assert list((whole.folder / "checkpoints").iterdir()) == [own]


def test_weights_of_steps_within_a_trial_are_saved_too(stages: TrainingStages) -> None:
    trial = stages(2, "with snapshot", first_steps=3, training=STEPS)
    train(trial.begin())
    plain = stages(2, "with snapshot", training=STEPS)
    assert plain.options is not None
    options = plain.options.model_copy(update={"snapshots": (2, 5)})
    whole = replace(plain, options=options)
    continue_from(whole, trial)
    train(whole.begin())
    snapshots = sorted((whole.folder / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["step-00002", "step-00005"]


def test_a_trial_without_a_checkpoint_changes_nothing(stages: TrainingStages) -> None:
    trial = stages(4, "never begun", first_steps=3, training=STEPS)
    whole = stages(4, "from the start", training=STEPS)
    continue_from(whole, trial)
    assert not whole.folder.exists()
