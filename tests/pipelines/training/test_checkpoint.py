"""A checkpoint that could not be written is reported soon, and does not fail a finished run."""

import errno
import os
import resource
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from pipelines.errors import PipelineError
from pipelines.runtime.heartbeats import read_notes
from pipelines.training.checkpoint import (
    checkpoint_steps,
    folder_name,
    latest_valid,
    remove_old,
    write_checkpoint,
)
from pipelines.training.checkpoint_state import load_trained_weights
from pipelines.training.checkpoint_writer import Checkpoints

FILE_BYTES = 4096


@pytest.fixture
def failed(tmp_path: Path) -> Checkpoints:
    """Return checkpoints of which the background thread failed to write the last one."""
    pending: Future[None] = Future()
    pending.set_exception(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    return Checkpoints(tmp_path / "checkpoints", 2, _pending=pending)


def test_the_next_checkpoint_raises_the_error_of_the_previous_one(failed: Checkpoints) -> None:
    with pytest.raises(OSError, match="No space left"):
        failed.due()


def test_a_checkpoint_of_another_version_is_refused_before_anything_changes() -> None:
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(PipelineError, match=r"contains start_A, .* another version .* delete"):
        load_trained_weights(model, {"weight": torch.ones(2, 2), "start_A": torch.ones(2)})
    assert torch.equal(model.weight, before)


def test_a_finished_run_notes_the_error(failed: Checkpoints, tmp_path: Path) -> None:
    with failed:
        pass
    assert read_notes(tmp_path, 0) == [
        "the last checkpoint was not written ([Errno 28] No space left on device)"
    ]


def test_the_error_that_ended_a_run_is_not_replaced(failed: Checkpoints) -> None:
    with pytest.raises(ArithmeticError), failed:
        raise ArithmeticError


def test_an_error_of_the_file_system_is_an_os_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(tmp_path / "step", [("a", {"a": torch.zeros(100_000)})], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_checkpoints_are_ordered_by_their_number(tmp_path: Path) -> None:
    steps = [5, 99_995, 100_000, 1_000_000]
    for step in reversed(steps):
        (tmp_path / folder_name(step)).mkdir()
    (tmp_path / "step-00007.partial").mkdir()
    assert checkpoint_steps(tmp_path) == steps


def test_the_newest_and_the_best_are_kept_and_the_newest_is_resumed_beyond_step_99999(
    tmp_path: Path,
) -> None:
    losses = {99_970: 0.2, 99_980: 0.4, 99_990: 0.6, 100_000: 0.5, 100_010: 0.7}
    for step, loss in losses.items():
        values = {"step": step, "loss": loss, "ranks": 1}
        tensors = {"a": torch.tensor(float(step))}
        write_checkpoint(tmp_path / folder_name(step), [("weights", tensors)], values)
    remove_old(tmp_path, keep=2)
    assert checkpoint_steps(tmp_path) == [99_970, 100_000, 100_010]
    newest = latest_valid(tmp_path)
    assert newest is not None and newest.step == 100_010
    assert float(newest.tensors["weights"]["a"]) == 100_010
