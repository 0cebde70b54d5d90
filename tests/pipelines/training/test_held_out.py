"""The held-out loss is that of transformers, and its best weights survive a stop and are saved."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from tiny import save_pairs
from torch.nn import functional as F
from training_stages import (
    ADAPTER_FILE,
    TrainingStages,
    adapter_of,
    latest_checkpoint,
    launch_training,
    losses_of,
    train_interrupted,
)
from transformers import AutoModelForCausalLM

from pipelines.errors import DataError
from pipelines.runtime.heartbeats import read_notes
from pipelines.runtime.interfaces.results import HeldOutLosses
from pipelines.runtime.stage import read_records
from pipelines.training import evaluations
from pipelines.training.train import train
from pipelines.workflow.stages import TrainStage

pytestmark = pytest.mark.slow
ZERO3 = {"config": "cpu_zero3", "processes": 2}
EVERY_TWO = {"evaluate_every": 2}
ROWS = 200
"""About a tenth of them is held out, and 8 of these are for validation."""


@pytest.fixture(scope="module")
def with_tuning(tmp_path_factory: pytest.TempPathFactory) -> TrainingStages:
    stages = TrainingStages.prepare(tmp_path_factory.mktemp("held-out"))
    save_pairs(stages.root / "pairs.jsonl", ROWS)
    return stages


def eval_losses_of(stage: TrainStage) -> dict[int, float]:
    """Return step → held-out loss."""
    rows = read_records(stage.folder / "metrics.jsonl")
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def held_out_of(stage: TrainStage) -> HeldOutLosses:
    result = stage.result()
    assert result is not None
    assert result.held_out is not None
    return result.held_out


def with_snapshots(stage: TrainStage, *steps: int) -> TrainStage:
    assert stage.options is not None
    return replace(stage, options=stage.options.model_copy(update={"snapshots": steps}))


def script_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Replace the held-out loss by given values, by step."""

    def scripted(*arguments: Any) -> float:
        return losses[arguments[-1]]

    monkeypatch.setattr(evaluations, "held_out_loss", scripted)


def tuning_examples(stage: TrainStage) -> Dataset:
    return load_from_disk(str(stage.paths.required("data") / "tuning"))


def loss_by_transformers(model_folder: str, stage: TrainStage) -> float:
    """Return the mean loss per supervised tuning token, one example at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    total, tokens = 0.0, 0
    for example in tuning_examples(stage):
        ids = torch.tensor([example["input_ids"]])
        supervised = torch.tensor(example["supervised"])[1:]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        total += float(nll[supervised].sum())
        tokens += int(supervised.sum())
    return total / tokens


def test_the_held_out_loss_is_that_of_transformers(with_tuning: TrainingStages) -> None:
    training = {**EVERY_TWO, "steps": 5}
    stage = with_snapshots(with_tuning(None, training=training), 2, 4)
    train(stage.begin())
    losses = eval_losses_of(stage)
    assert list(losses) == [2, 4, 5]
    for step in (2, 4):
        snapshot = stage.folder / f"snapshots/step-{step:05d}/model"
        expected = loss_by_transformers(str(snapshot), stage)
        assert losses[step] == pytest.approx(expected, abs=1e-5)
    held_out = held_out_of(stage)
    assert [(one.step, one.eval_loss) for one in held_out.losses] == list(losses.items())
    trained = losses_of(stage)
    means = [sum(trained[:2]) / 2, sum(trained[2:4]) / 2, trained[4]]
    assert [one.train_loss for one in held_out.losses] == pytest.approx(means)
    best = loss_by_transformers(str(stage.folder / "model"), stage)
    assert best == pytest.approx(held_out.best_eval_loss, abs=1e-5)
    assert held_out.best_eval_loss == min(losses.values())
    assert held_out.examples == len(tuning_examples(stage)) > 0


def test_evaluations_do_not_change_the_training(with_tuning: TrainingStages) -> None:
    """With dropout, a single random number drawn by an evaluation would."""
    changes: dict[str, Any] = {"lora": {"dropout": 0.2}}
    evaluated = with_tuning(4, training={"evaluate_every": 1}, **changes)
    plain = with_tuning(4, **changes)
    assert evaluated.key != plain.key
    for stage in (evaluated, plain):
        train(stage.begin())
    assert losses_of(evaluated) == losses_of(plain)
    result = plain.result()
    assert result is not None
    assert result.held_out is None


def test_two_ranks_with_sharded_weights_evaluate_like_one_process(
    with_tuning: TrainingStages,
) -> None:
    """Of two ranks under ZeRO-3, one reads two of the three tuning examples."""
    single = with_tuning(4, "single", training=EVERY_TWO)
    two_ranks = with_tuning(4, "two-ranks", training=EVERY_TWO, launch=ZERO3)
    assert single.key == two_ranks.key
    train(single.begin())
    launch_training(two_ranks, **ZERO3)
    other = eval_losses_of(two_ranks)
    assert len(other) == 3
    assert other == pytest.approx(eval_losses_of(single), abs=2e-4)
    assert held_out_of(two_ranks).best_step == held_out_of(single).best_step


def test_the_weights_of_the_best_evaluation_are_saved(
    with_tuning: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_losses(monkeypatch, {2: 3.0, 4: 1.0, 6: 2.0})
    stage = with_tuning(2, training=EVERY_TWO)
    stage = with_snapshots(stage, 2, 4)
    train(stage.begin())
    held_out = held_out_of(stage)
    assert (held_out.best_step, held_out.best_eval_loss) == (4, 1.0)
    assert not held_out.stopped_early
    snapshot = stage.folder / "snapshots/step-00004/adapter/adapter_model.safetensors"
    assert (stage.folder / ADAPTER_FILE).read_bytes() == snapshot.read_bytes()
    assert len(losses_of(stage)) == 6
    assert not (stage.folder / "checkpoints").exists()


def test_a_stopped_run_resumes_with_the_same_best_weights_and_stops_at_the_same_step(
    with_tuning: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3's weights are the best, and step 2's are kept for the checkpoint of step 2."""
    training = {"steps": 10, "evaluate_every": 1, "early_stopping_patience": 4}
    script_losses(monkeypatch, {1: 5.0, 2: 4.0, 3: 2.0, 4: 3.0, 5: 3.0, 6: 3.0, 7: 3.0})
    stages = [with_tuning(4, name, training=training) for name in ("all", "part")]
    uninterrupted, stopped = stages
    train(uninterrupted.begin())
    train_interrupted(stopped, monkeypatch, steps=5)
    assert latest_checkpoint(stopped).name == "step-00004"
    best = stopped.folder / "checkpoints" / "best"
    assert {path.name for path in best.iterdir()} == {"step-00002", "step-00003"}
    train(stopped.begin())
    for stage in stages:
        held_out = held_out_of(stage)
        assert (held_out.best_step, held_out.stopped_early) == (3, True)
        assert len(losses_of(stage)) == 7
        assert any("after step 7 of 10" in text for text in read_notes(stage.folder, 0))
    assert held_out_of(stopped) == held_out_of(uninterrupted)
    for key, tensor in adapter_of(stopped).items():
        assert torch.equal(tensor, adapter_of(uninterrupted)[key]), key


def test_a_run_that_resumes_before_the_best_step_repeats_its_evaluation(
    with_tuning: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a better step after the checkpoint are not used without its evaluation."""
    script_losses(monkeypatch, {1: 5.0, 2: 4.0, 3: 2.0, 4: 3.0, 5: 3.0, 6: 3.0, 7: 3.0})
    stopped = with_tuning(4, training={"evaluate_every": 1, "steps": 7})
    train_interrupted(stopped, monkeypatch, steps=3)
    assert latest_checkpoint(stopped).name == "step-00002"
    script_losses(monkeypatch, {3: 4.5, 4: 4.5, 5: 4.5, 6: 4.5, 7: 4.5})
    stopped = with_snapshots(stopped, 3)
    train(stopped.begin())
    assert held_out_of(stopped).best_step == 2
    snapshot = stopped.folder / "snapshots/step-00003/adapter/adapter_model.safetensors"
    assert (stopped.folder / ADAPTER_FILE).read_bytes() != snapshot.read_bytes()


def test_data_without_tuning_examples_is_refused(prepared: TrainingStages) -> None:
    """All held-out examples of fewer rows are for validation."""
    stage = prepared(4, "no-tuning", training=EVERY_TWO)
    assert not (stage.paths.required("data") / "tuning").exists()
    with pytest.raises(DataError, match=r"evaluate_every needs .* lower data\.validation_examples"):
        train(stage.begin())
    assert not (stage.folder / "metrics.jsonl").exists()
