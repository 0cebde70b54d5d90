"""A run resumes on another number of ranks, or from the checkpoint before a damaged one.

The best checkpoint is kept in addition to the newest.
"""

import json
from pathlib import Path

import pytest

from distributed.trainings import Trainings, farthest, losses, outcome, train_all
from pipelines.runtime.stage import Stage
from pipelines.training import checkpoint

pytestmark = pytest.mark.slow
BREAK = 5
"""Steps done when a run is interrupted; its newest checkpoint has four."""


DAMAGES = ("a flipped bit", "cut short", "a missing file")


@pytest.fixture(scope="module")
def interrupted(trainings: Trainings) -> dict[str, Stage]:
    """Return interrupted runs of two ranks, one for each test, by name."""
    stages = {
        name: trainings.stage("QLoRA", name.replace(" ", "-"), 2)
        for name in ("to one", "to four", *DAMAGES)
    }
    train_all(
        "cpu_zero2",
        2,
        [f"{stage.folder}:{BREAK}" for stage in stages.values()],
        trainings.root / "interrupted.log",
    )
    return stages


@pytest.mark.parametrize(
    ("name", "config", "processes"), [("to one", "cpu_single", 1), ("to four", "cpu_ddp", 4)]
)
def test_two_ranks_resume_on_another_number_of_ranks(
    trainings: Trainings,
    alone: dict[str, Stage],
    interrupted: dict[str, Stage],
    name: str,
    config: str,
    processes: int,
) -> None:
    stage = trainings.stage("QLoRA", name.replace(" ", "-"), processes)
    log = trainings.root / f"{config}.log"
    assert stage.folder == interrupted[name].folder
    train_all(config, processes, [str(stage.folder)], log)
    assert "from step 4" in log.read_text()
    assert losses(stage) == pytest.approx(losses(alone["QLoRA"]), abs=2e-6)
    assert farthest(outcome(alone["QLoRA"]), outcome(stage)) < 5e-5


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    trainings: Trainings, alone: dict[str, Stage], interrupted: dict[str, Stage]
) -> None:
    for damage in DAMAGES:
        damage_file(
            interrupted[damage].folder / "checkpoints" / "step-00004" / "exp_avg.safetensors",
            damage,
        )
    log = trainings.root / "damaged.log"
    train_all("cpu_zero2", 2, [str(interrupted[damage].folder) for damage in DAMAGES], log)
    assert (
        log.read_text().count("step-00004 is damaged (")
        == log.read_text().count("from step 2")
        == len(DAMAGES)
    )
    for damage in DAMAGES:
        assert losses(interrupted[damage]) == pytest.approx(losses(alone["QLoRA"]), abs=2e-6)


def test_the_newest_and_the_best_checkpoints_are_kept_and_one_without_state_is_skipped(
    trainings: Trainings,
) -> None:
    stage = trainings.stage(
        "QLoRA", "kept", training={"steps": 14, "checkpoint_every": 1, "checkpoints_kept": 2}
    )
    train_all("cpu_single", 1, [f"{stage.folder}:11"], trainings.root / "kept.log")
    kept = sorted((stage.folder / "checkpoints").glob("step-*"))
    rows = losses(stage)[:11]
    best = rows.index(min(rows)) + 1
    assert {int(folder.name[5:]) for folder in kept} == {10, 11, best}
    state = json.loads((kept[-1] / "state.json").read_text())
    assert (state["step"], state["ranks"]) == (11, 1)
    assert set(state["files"]) == {
        "weights.safetensors",
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "random.safetensors",
    }
    (kept[0] / "state.json").write_text("")
    train_all("cpu_single", 1, [str(stage.folder)], trainings.root / "stateless.log")
    assert "from step 11" in (trainings.root / "stateless.log").read_text()
    assert len(losses(stage)) == 14


def test_an_expensive_checkpoint_is_postponed_and_an_ended_run_leaves_it_complete(
    trainings: Trainings,
) -> None:
    """A checkpoint takes more than 2% of a tiny model's steps; the first cost is an estimate."""
    settings = {
        "steps": 40,
        "checkpoint_every": 1,
        "checkpoints_kept": 40,
        "checkpoint_time_fraction": 0.02,
    }
    stage = trainings.stage("LoRA", "expensive", training=settings)
    train_all("cpu_single", 1, [f"{stage.folder}:39"], trainings.root / "expensive.log")
    written = sorted((stage.folder / "checkpoints").glob("step-*"))
    assert 1 <= len(written) < 20
    assert all(checkpoint.corruption_reason(folder) is None for folder in written)


def damage_file(path: Path, damage: str) -> None:
    """Damage a file as a disk error or a kill does."""
    content = bytearray(path.read_bytes())
    if damage == "a missing file":
        path.unlink()
        return
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "a flipped bit" else content[: len(content) // 2])
