"""The size of a checkpoint, and the best interval between checkpoints. Imports no torch.

A job on n GPUs fails n times as often as a job on one. With w seconds to write a checkpoint and M
seconds between failures, an interval of √(2 w M) seconds loses the least time (Young 1974, doi
10.1145/361147.361115). The refinement of Daly 2006 (doi 10.1016/j.future.2004.11.016) differs by
less than w if w is far below M; otherwise it limits the interval to M.
"""

from math import sqrt

STATE_TENSORS = 3
"""Per trained weight: the weight and Adam's two moments."""
FLOAT32 = 4
YEAR_SECONDS = 365.25 * 24 * 3600
LLAMA3_FAILURES = 419
"""Unexpected interruptions in the pre-training of Llama 3.

Source: Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.4.
"""
LLAMA3_GPUS = 16_384
LLAMA3_SECONDS = 54 * 24 * 3600
FAILURES_PER_GPU_YEAR = round(LLAMA3_FAILURES / LLAMA3_GPUS / (LLAMA3_SECONDS / YEAR_SECONDS), 3)
"""Llama 3 used 16,384 GPUs for 54 days: 0.173 failures per GPU and year."""


def checkpoint_bytes(trained_weights: int) -> int:
    """Return the size of a checkpoint: trained weights and both Adam moments in float32.

    Args:
        trained_weights: number of trained weights.
    """
    return STATE_TENSORS * FLOAT32 * trained_weights


def seconds_between_failures(failures_per_gpu_year: float, gpus: int) -> float:
    """Return the mean time between failures of a job that stops when any GPU fails.

    Args:
        failures_per_gpu_year: mean number of failures of one GPU in a year, above 0.
        gpus: number of GPUs of the job.
    """
    return YEAR_SECONDS / (failures_per_gpu_year * gpus)


def best_interval_seconds(write_seconds: float, between_failures: float) -> float:
    """Return the checkpoint interval that loses the least time; see the module docstring.

    Args:
        write_seconds: time to write a checkpoint.
        between_failures: mean seconds between failures.
    """
    if write_seconds >= between_failures / 2:
        return between_failures
    return sqrt(2 * write_seconds * between_failures)


def lost_fraction(interval_seconds: float, write_seconds: float, between_failures: float) -> float:
    """Return the fraction of time that is lost, to first order.

    The job loses the time to write, and half an interval of repeated work at each failure.

    Args:
        interval_seconds: time between checkpoints.
        write_seconds: time to write a checkpoint.
        between_failures: mean seconds between failures.
    """
    writing = write_seconds / interval_seconds
    repeated_work = interval_seconds / (2 * between_failures)
    return writing + repeated_work
