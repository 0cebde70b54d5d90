"""Two ranks train like one process, a step reports its metrics, and a wrong setup is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from training_stages import TrainingStages, adapter_of, launch_training, losses_of

from lora_core.adapter.json_files import read_json
from lora_core.files import write_json
from pipelines.data.batches import order
from pipelines.errors import StageError
from pipelines.runtime.interfaces.verified import Verified
from pipelines.runtime.stage import read_records
from pipelines.training import verification
from pipelines.training.run import PROBE_TOKENS
from pipelines.training.train import train
from pipelines.workflow.stages import TrainStage

pytestmark = pytest.mark.slow
ZERO2 = {"config": "cpu_zero2", "processes": 2}


def test_two_ranks_equal_one_process(prepared: TrainingStages) -> None:
    """They also initialize from the same data."""
    single = prepared(4, "single", lora={"init": "eva"})
    two_ranks = prepared(4, "two-ranks", lora={"init": "eva"}, launch=ZERO2)
    train(single.begin())
    launch_training(two_ranks, **ZERO2)
    assert losses_of(two_ranks) == pytest.approx(losses_of(single), abs=2e-4)
    rows = read_records(two_ranks.folder / "metrics.jsonl")
    assert all("communication" in row["seconds_of"] for row in rows)
    other = adapter_of(two_ranks)
    for key, tensor in adapter_of(single).items():
        # In each of 6 steps Adam moves an entry by up to the learning rate of 0.01, and by its
        # sign alone if the gradient is near 0.
        assert (tensor - other[key]).norm() < 0.05 * tensor.norm(), key
    identity = read_json(two_ranks.folder / "adapter" / "adapter_identity.json")
    assert identity["lineage"]["init"] == "eva"


def test_a_row_has_the_metrics_of_its_step(
    prepared: TrainingStages, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"gradient_accumulation_steps": 2}
    stage = prepared(4, "one-run", lora={"alpha": 16}, training=training)
    train(stage.begin())
    rows = read_records(stage.folder / "metrics.jsonl")
    for row in rows:
        phases = row["seconds_of"]
        assert row["grad_norm"] > 0
        assert row["peak_memory_bytes"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], abs=0.1)
        assert {"data", "forward", "backward", "optimizer"} <= phases.keys()
        in_step = sum(value for name, value in phases.items() if name != "checkpoint")
        assert in_step <= row["seconds"] + 1e-3
    assert "checkpoint" not in rows[1]["seconds_of"]
    assert "checkpoint" in rows[2]["seconds_of"]  # it follows step 2's row
    output = capsys.readouterr().out
    assert "device cpu, float32, gloo, flash attention, fused AdamW (on a CPU)" in output
    result = stage.result()
    assert result is not None
    assert (result.facts.optimizer, result.facts.attention) == ("fused AdamW", "flash")


def test_the_second_rank_uses_the_verification_of_the_first(
    prepared: TrainingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains as if it had verified by itself, and its result names the training that did."""
    first, second = prepared(4, "shared"), prepared(2, "shared")
    alone = prepared(2, "alone")
    train(first.begin())
    train(alone.begin())

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("verified a second time")

    with monkeypatch.context() as patch:
        patch.setattr(verification, "verified_reader", refuse)
        train(second.begin())
    assert losses_of(second) == losses_of(alone)
    verifications = [forward_of(stage) for stage in (first, second, alone)]
    assert [one.verified_by for one in verifications] == [None, first.folder.name, None]
    assert verifications[1].loss_difference == verifications[0].loss_difference


def forward_of(stage: TrainStage) -> Verified:
    result = stage.result()
    assert result is not None
    return result.facts.forward


def test_a_loftq_run_starts_nearer_to_the_full_precision_base(prepared: TrainingStages) -> None:
    changes = {
        "quantized": {},
        "loftq": {"lora": {"init": "loftq", "ranks": [32]}},
        "full precision": {"base_model": {"quantization": "none"}},
    }
    # With many examples per step: the quantization errors of few may cancel out.
    training = {"batch_size": 48, "steps": 3}
    first = {}
    for name, change in changes.items():
        stage = prepared(32, **change, training=training)
        train(stage.begin())
        first[name] = losses_of(stage)[0]
    error_of_loftq = abs(first["loftq"] - first["full precision"])
    error_of_quantization = abs(first["quantized"] - first["full precision"])
    assert error_of_loftq < 0.5 * error_of_quantization


def test_a_base_whose_loss_is_not_finite_is_refused_before_the_first_step(
    prepared: TrainingStages,
) -> None:
    stage = prepared(4, "broken")
    broken_base = stage.folder.parent / "broken-base"
    copy_with_nan(stage.paths.required("base"), broken_base)
    broken = replace(stage, paths=stage.paths.model_copy(update={"base": str(broken_base)}))
    with pytest.raises(StageError, match=r"'llama' .* not finite"):
        launch_training(broken)
    assert not (broken.folder / "adapter").exists()


def test_a_base_that_one_rank_refuses_is_refused_with_its_reason(prepared: TrainingStages) -> None:
    """The ranks verify on different examples: only the longest one has the broken token."""
    stage = prepared(4, "broken-for-one", launch=ZERO2)
    examples = list(load_from_disk(str(stage.paths.required("data") / "train"))["input_ids"])
    training = stage.inputs.training
    steps = order(len(examples), training.steps, training.batch_size, stage.inputs.seed)
    used = sorted({index for step in steps for index in step})
    by_length = sorted((examples[index] for index in used), key=len)
    read_by_the_other_rank = {*by_length[0], *by_length[len(by_length) // 2][:PROBE_TOKENS]}
    only_in_longest = sorted(set(by_length[-1]) - read_by_the_other_rank)
    assert only_in_longest, "the longest example has a token that the other probe lacks"
    broken_base = stage.folder.parent / "broken-token"
    copy_with_nan_token(stage.paths.required("base"), broken_base, only_in_longest[0])
    broken = replace(stage, paths=stage.paths.model_copy(update={"base": str(broken_base)}))
    with pytest.raises(StageError, match=r"'llama' .* not finite"):
        launch_training(broken, **ZERO2)


def copy_with_nan(base: Path, folder: Path) -> None:
    """Copy a base and set its final norm to NaN."""
    shutil.copytree(base, folder)
    file = str(folder / "model.safetensors")
    weights = load_file(file)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})


def copy_with_nan_token(base: Path, folder: Path, token: int) -> None:
    """Copy a base, with an output head of its own, and set the embedding of a token to NaN."""
    shutil.copytree(base, folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"tie_word_embeddings": False})
    file = str(folder / "model.safetensors")
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone()
    embedding[token] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def test_a_launch_that_starts_too_few_ranks_is_refused(prepared: TrainingStages) -> None:
    stage = prepared(4, "too-few", launch=ZERO2)
    with pytest.raises(StageError, match=r"1 ranks started, but launch\.processes is 2"):
        launch_training(stage, "cpu_single", 1)


def test_a_launch_for_gpus_is_refused_without_a_gpu(prepared: TrainingStages) -> None:
    stage = prepared(4, "no-gpu", launch={"config": "gpu_ddp", "processes": 1})
    message = (
        r"launch\.config is for GPUs, but PyTorch \S+ finds no GPU on .* that begins with cpu_"
    )
    with pytest.raises(StageError, match=message):
        launch_training(stage, "gpu_ddp", 1)
