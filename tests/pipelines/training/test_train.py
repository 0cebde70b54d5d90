"""Training's laws, with real processes: two ranks equal one, a killed run leaves no process and goes on bit for bit."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tiny import save_pairs, save_tiny_model, tiny_recipe

from lora_core.adapter.adapter_files import read_json
from lora_core.calibration import given
from lora_core.init.spectral import spectral_start
from lora_core.layers import linear
from pipelines.config.experiments import Experiment, control_experiments
from pipelines.config.recipe import parse_recipe
from pipelines.errors import StageError
from pipelines.models.hardware import PAGED, Hardware, Optimizer
from pipelines.models.packs import Pack
from pipelines.runtime import launcher
from pipelines.runtime.stage import Stage, read_records, read_result
from pipelines.training import objective
from pipelines.training import train as train_module
from pipelines.training.train import train, train_step
from pipelines.workflow.stages import Stages

pytestmark = pytest.mark.slow
ZERO2 = {"config": "cpu_zero2", "processes": 2}
MANY_SETTINGS = {
    "dropout": 0.1,
    "use_dora": True,
    "loraplus_ratio": 4,
    "init": "pissa_niter_2",
    "exclude_modules": ["down_proj"],
    "layers_to_transform": [1],
}
Prepared = Callable[..., Stage]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return what makes a training stage of the tiny recipe, its base and data prepared once."""
    root = tmp_path_factory.mktemp("train")
    model, pairs = save_tiny_model(root / "model"), save_pairs(root / "pairs.jsonl")

    def make(rank: int | None, runs: str = "runs", **changes: dict[str, Any]) -> Stage:
        stages = Stages(parse_recipe(tiny_recipe(model, pairs, **changes)), root / runs)
        base = launcher.result_of(stages.base(), "pipelines.models.base_model", threads=1)
        data_stage = stages.data(base)
        data = (data_stage, launcher.result_of(data_stage, "pipelines.data.preparation", threads=1))
        arm = control_experiments(stages.recipe)[0]
        if rank is not None:
            arm = Experiment(f"rank-{rank}", "lora", stages.recipe.lora.learning_rate, rank)
        return stages.train(base, data, arm)

    return make


def _train(stage: Stage, config: str = "cpu_single", processes: int = 1) -> dict[str, Any]:
    return launcher.run_child(
        stage, launcher.accelerate_argv(config, processes, stage.begin()), threads=1
    )


def _losses(stage: Stage) -> list[float]:
    return _column(stage, "loss")


def _column(stage: Stage, name: str) -> list[float]:
    return [row[name] for row in read_records(stage.folder / "metrics.jsonl")]


def test_a_run_killed_in_the_middle_goes_on_bit_for_bit(prepared: Prepared) -> None:
    uninterrupted, killed = (
        prepared(4, runs, launch=ZERO2, lora=MANY_SETTINGS) for runs in ("whole", "killed")
    )
    _train(uninterrupted, **ZERO2)
    assert _kill_after(killed, step=3) >= 3
    assert _processes_left(killed, seconds=20) == []
    assert len(_starts_in_checkpoint(killed)) == 2 * 6  # A and B of each of block 1's targets
    _train(killed, **ZERO2)
    log = (killed.folder / "log.txt").read_text()
    assert "from step 2" in log or "from step 4" in log  # by when the kill came
    assert _losses(killed) == _losses(uninterrupted)
    same = [
        (stage.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for stage in (killed, uninterrupted)
    ]
    assert same[0] == same[1]
    saved = load_file(str(killed.folder / "adapter" / "adapter_model.safetensors"))
    keys = saved.keys()
    assert {tensor.shape[0] for key, tensor in saved.items() if "lora_A" in key} == {
        8
    }  # the trained pair, less the start
    assert any(key.endswith("q_proj.lora_magnitude_vector") for key in keys)
    assert not any("layers.0." in key or "down_proj" in key for key in keys)


def test_two_ranks_start_from_the_same_data_as_one_process(prepared: Prepared) -> None:
    alone, together = (
        prepared(4, "alone", lora={"init": "eva"}),
        prepared(4, "together", lora={"init": "eva"}, launch=ZERO2),
    )
    train(alone.begin())
    _train(together, **ZERO2)
    assert _losses(together) == pytest.approx(_losses(alone), abs=2e-4)
    first, second = (
        load_file(str(stage.folder / "adapter" / "adapter_model.safetensors"))
        for stage in (alone, together)
    )
    for key, tensor in first.items():
        # Adam moves an entry by up to the rate 0.01 in each of 6 steps, and by its sign alone where the gradient is near 0.
        assert (tensor - second[key]).norm() < 0.05 * tensor.norm(), key
    identity = read_json(together.folder / "adapter" / "adapter_identity.json")
    assert identity["lineage"]["init"] == "eva"


def test_a_resumed_run_keeps_the_start_of_its_checkpoint(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever start is found the second time, as by another machine's decomposition: what is taken off again is the first."""
    whole, stopped = (prepared(4, runs, lora={"init": "pissa"}) for runs in ("one-go", "two-goes"))
    train(whole.begin())
    _break_off(stopped, monkeypatch, steps=3)
    latest_valid = sorted((stopped.folder / "checkpoints").glob("step-*"))[-1]
    held = {
        name.rpartition(".")[2] for name in load_file(str(latest_valid / "weights.safetensors"))
    }
    assert held == {"lora_A", "lora_B", "init_A", "start_B"}  # and nothing of the base
    with monkeypatch.context() as patch:
        patch.setattr(
            linear,
            "spectral_start",
            lambda *arguments: tuple(0.5 * factor for factor in spectral_start(*arguments)),
        )
        train(stopped.begin())
    assert _losses(stopped) == _losses(whole)
    files = [
        (stage.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for stage in (stopped, whole)
    ]
    assert files[0] == files[1]
    figures = read_result(stopped.folder)
    assert (figures["file_rank"], figures["trained_weights"]) == (
        8,
        4 * 2 * (4 * 64 + 2 * 32 + 2 * 64 + 64 + 128 + 128 + 64 + 128 + 64),
    )


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_control_whose_optimiser_keeps_8_bits_goes_on_bit_for_bit(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU its state lies in pages."""
    whole, stopped = (prepared(None, runs) for runs in ("one-go", "two-goes"))
    monkeypatch.setattr(
        train_module, "optimizer_of", lambda *_, **__: Optimizer(PAGED, "the test asks for it")
    )
    train(whole.begin())
    _break_off(stopped, monkeypatch, steps=3)
    latest_valid = sorted((stopped.folder / "checkpoints").glob("step-*"))[-1]
    means = load_file(str(latest_valid / "exp_avg.safetensors"))
    assert means["model.layers.0.mlp.down_proj.weight"].dtype is torch.uint8
    train(stopped.begin())
    assert _losses(stopped) == _losses(whole)
    files = [
        (stage.folder / "model" / "model.safetensors").read_bytes() for stage in (stopped, whole)
    ]
    assert files[0] == files[1]
    figures = whole.result()
    assert figures is not None and figures["optimizer"] == "paged 8-bit AdamW"


@pytest.fixture
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """Return what makes accelerate forget its precision, which it keeps for the length of a process."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    yield forget
    forget()


def test_a_control_that_computes_in_bfloat16_trains_float32_weights(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: Callable[[], None]
) -> None:
    """As on a GPU; only the device is another. A rate of 1e-5 is below the spacing of nearly all weights in bfloat16."""
    rate = {"learning_rate": 1e-5}
    stages = {
        dtype: prepared(None, str(dtype), control=rate) for dtype in (torch.float32, torch.bfloat16)
    }
    moved = {}
    for dtype, stage in stages.items():
        fresh_accelerate()
        monkeypatch.setattr(
            train_module, "detect", lambda dtype=dtype: Hardware("cpu", dtype, "gloo")
        )
        train(stage.begin())
        trained = load_file(str(stage.folder / "model" / "model.safetensors"))
        base = load_file(str(Path(stage.paths["base"]) / "model.safetensors"))
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        moved[dtype] = {
            name: float((tensor != base[name]).float().mean()) for name, tensor in trained.items()
        }
    for name, fraction in moved[torch.float32].items():
        assert moved[torch.bfloat16][name] == pytest.approx(fraction, abs=0.02), name
    assert (
        min(fraction for name, fraction in moved[torch.bfloat16].items() if "embed" not in name)
        > 0.97
    )
    figures = stages[torch.bfloat16].result()
    assert (
        figures is not None
        and figures["forward"]["path"] == "packed"
        and figures["forward"]["loss_tolerance"] == 0.02
    )


def test_an_adapter_computes_in_bfloat16_without_autocast(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: Callable[[], None]
) -> None:
    """As on a GPU, and as the adapter is scored: a router or a norm that a model keeps in float32 stays so."""
    forward, autocast = objective.Objective.forward, list[bool]()

    def noted(self: objective.Objective, part: Pack) -> torch.Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return forward(self, part)

    monkeypatch.setattr(objective.Objective, "forward", noted)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        fresh_accelerate()
        stage = prepared(4, f"adapter-{dtype}")
        monkeypatch.setattr(
            train_module, "detect", lambda dtype=dtype: Hardware("cpu", dtype, "gloo")
        )
        train(stage.begin())
        losses[dtype] = _losses(stage)
        saved = load_file(str(stage.folder / "adapter" / "adapter_model.safetensors"))
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert autocast and not any(autocast)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], abs=0.05)
    assert losses[torch.bfloat16] != losses[torch.float32]


def test_a_row_holds_what_a_step_took(
    prepared: Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = prepared(4, "one-go", lora={"alpha": 16}, training={"gradient_accumulation_steps": 2})
    train(stage.begin())
    rows = read_records(stage.folder / "metrics.jsonl")
    for row in rows:
        assert row["grad_norm"] > 0 and row["peak_memory_bytes"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], abs=0.1)
        assert {"data", "forward", "backward", "optimizer"} <= row["seconds_of"].keys()
        assert (
            sum(value for name, value in row["seconds_of"].items() if name != "checkpoint")
            <= row["seconds"] + 1e-3
        )
    assert (
        "checkpoint" in rows[2]["seconds_of"] and "checkpoint" not in rows[1]["seconds_of"]
    )  # it follows step 2's row
    assert "device cpu, float32, gloo, flash attention, AdamW (on a CPU)" in capsys.readouterr().out
    figures = stage.result()
    assert figures is not None and (figures["optimizer"], figures["attention"]) == (
        "AdamW",
        "flash",
    )


def test_a_resumed_run_does_not_look_for_its_start_again(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (prepared(4, runs, lora={"init": "eva"}) for runs in ("one-go", "two-goes"))
    train(whole.begin())
    _break_off(stopped, monkeypatch, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(given, "eva_starts", None)
        train(stopped.begin())
    assert _losses(stopped) == _losses(whole)


def test_a_finished_run_that_is_asked_for_a_snapshot_keeps_its_outcome(prepared: Prepared) -> None:
    """It goes as far as the snapshot and no further, and what it had written stays to the byte."""
    stage = prepared(4, "asked-later")
    train(stage.begin())
    names = ("metrics.jsonl", "adapter/adapter_model.safetensors")
    before, figures = {name: (stage.folder / name).read_bytes() for name in names}, stage.result()
    expected = "snapshots/step-00002/adapter/adapter_config.json"
    asked = replace(stage, options={**stage.options, "snapshots": [2]}, expects=(expected,))
    assert asked.folder == stage.folder and asked.result() is None
    train(asked.begin())
    assert asked.result() == figures and (stage.folder / expected).is_file()
    assert {name: (stage.folder / name).read_bytes() for name in names} == before
    assert not (stage.folder / "checkpoints").exists()


def test_a_loftq_run_starts_nearer_to_the_base_before_it_was_rounded(prepared: Prepared) -> None:
    starts = {
        "rounded": {},
        "loftq": {"lora": {"init": "loftq", "ranks": [32]}},
        "full_precision_weights": {"base_model": {"quantization": "none"}},
    }
    first = {}
    for name, changes in starts.items():
        stage = prepared(
            32, **changes, training={"batch_size": 48, "steps": 3}
        )  # many examples: the rounding of few may cancel out
        train(stage.begin())
        first[name] = _losses(stage)[0]
    assert abs(first["loftq"] - first["full_precision_weights"]) < 0.5 * abs(
        first["rounded"] - first["full_precision_weights"]
    )


def test_a_base_whose_loss_is_not_finite_is_refused_before_the_first_step(
    prepared: Prepared,
) -> None:
    stage = prepared(4, "broken")
    _break(Path(stage.paths["base"]), stage.folder.parent / "broken-base")
    broken = Stage(
        stage.kind,
        stage.label,
        stage.inputs,
        stage.root,
        {**stage.paths, "base": str(stage.folder.parent / "broken-base")},
        stage.options,
    )
    with pytest.raises(
        StageError,
        match=r"'llama' gives a loss that is not finite on an example of this run by its own forward",
    ):
        _train(broken)
    assert not (broken.folder / "adapter").exists()


def test_a_launch_that_brings_up_too_few_ranks_is_refused(prepared: Prepared) -> None:
    stage = prepared(4, "too-few", launch=ZERO2)
    with pytest.raises(StageError, match=r"1 ranks came up where launch\.processes asks for 2"):
        _train(stage, "cpu_single", 1)


def test_a_launch_for_gpus_is_refused_where_there_is_none(prepared: Prepared) -> None:
    stage = prepared(4, "no-gpu", launch={"config": "gpu_ddp", "processes": 1})
    with pytest.raises(
        StageError,
        match=r"launch\.config is one for GPUs, and PyTorch \S+ sees none on .*begins with cpu_",
    ):
        _train(stage, "gpu_ddp", 1)


def _break_off(stage: Stage, monkeypatch: pytest.MonkeyPatch, *, steps: int) -> None:
    """Train in this process until so many steps are done."""
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", _stopping_after(steps))
        with pytest.raises(KeyboardInterrupt):
            train(stage.begin())


def _stopping_after(steps: int) -> Callable[..., dict[str, Any]]:
    """Return a `train_step` that is interrupted once so many steps are done."""
    done: list[int] = []

    def step(*arguments: Any) -> dict[str, Any]:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return train_step(*arguments)

    return step


def _starts_in_checkpoint(stage: Stage) -> list[str]:
    """Return the names of the frozen starts in the newest checkpoint."""
    latest_valid = sorted((stage.folder / "checkpoints").glob("step-*"))[-1]
    return [
        name
        for name in load_file(str(latest_valid / "weights.safetensors"))
        if name.endswith((".init_A", ".start_B"))
    ]


def _kill_after(stage: Stage, *, step: int) -> int:
    """Start training in a process of its own, kill that process with SIGKILL after `step` steps; return the steps done."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); from pipelines import launch;"
        "launch.subprocess.run(launcher.accelerate_argv('cpu_zero2', 2, Path(sys.argv[1])), env=launcher._environment(1),"
        " stdout=open(sys.argv[2], 'w'), stderr=-2, preexec_fn=launcher.die_with_parent)"
    )
    log = stage.begin().parent / "killed.txt"
    argv = [
        launcher.sys.executable,
        "-c",
        code,
        str(stage.folder),
        str(log),
        str(launcher.REPOSITORY),
    ]
    run = subprocess.Popen(argv)
    metrics = stage.folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            break
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return metrics.read_text().count("\n")


def _break(base: Path, folder: Path) -> None:
    """Copy a base with a final norm that is not a number."""
    shutil.copytree(base, folder)
    weights = load_file(str(folder / "model.safetensors"))
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _processes_left(stage: Stage, *, seconds: float) -> list[Path]:
    deadline = time.monotonic() + seconds
    while _processes_of(stage) and time.monotonic() < deadline:
        time.sleep(0.2)
    return _processes_of(stage)


def _processes_of(stage: Stage) -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(stage.folder).encode() in (process / "cmdline").read_bytes()
                and int(process.name) != os.getpid()
            ):
                found.append(process)
        except OSError:
            continue
    return found
