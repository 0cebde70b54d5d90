"""A checkpoint that could not be written is told of soon, and costs a run that is done nothing."""

import errno
import os
import resource
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from pipelines.runtime.heartbeats import read_notes
from pipelines.training.checkpoint import Checkpoints, _save


@pytest.fixture
def failed(tmp_path: Path) -> Checkpoints:
    """Return checkpoints of which the last could not be written beside the training."""
    pending: Future[None] = Future()
    pending.set_exception(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    return Checkpoints(tmp_path / "checkpoints", 2, _pending=pending)


def test_the_next_turn_raises_what_the_writing_raised(failed: Checkpoints) -> None:
    with pytest.raises(OSError, match="No space left"):
        failed.due()


def test_a_run_that_is_done_notes_it(failed: Checkpoints, tmp_path: Path) -> None:
    with failed:
        pass
    assert read_notes(tmp_path, 0) == [
        "the last checkpoint was not written ([Errno 28] No space left on device)"
    ]


def test_what_ended_a_run_is_not_replaced(failed: Checkpoints) -> None:
    with pytest.raises(ArithmeticError), failed:
        raise ArithmeticError


def test_what_the_system_refuses_is_an_error_of_the_system(tmp_path: Path) -> None:
    limits, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            _save({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
