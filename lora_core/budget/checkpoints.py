"""How large a checkpoint is, and how often it pays to write one. Pure, and imports no torch.

A job of n GPUs fails n times as often as one. With w seconds to write a checkpoint and M seconds between failures, √(2 w M)
seconds between checkpoints lose least (Young 1974, doi 10.1145/361147.361115); the refinement of Daly 2006
(doi 10.1016/j.future.2004.11.016) differs by less than w where w is far below M, and where it is not, by waiting no longer than M.
"""

from math import sqrt

STATE_TENSORS = 3
"""Of each trained weight: itself, and Adam's two means."""
FLOAT32 = 4
YEAR_SECONDS = 365.25 * 24 * 3600
LLAMA3_FAILURES = 419
"""Unexpected interruptions of Llama 3's pre-training (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.4) …"""
LLAMA3_GPUS = 16_384
LLAMA3_SECONDS = 54 * 24 * 3600
FAILURES_PER_GPU_YEAR = round(LLAMA3_FAILURES / LLAMA3_GPUS / (LLAMA3_SECONDS / YEAR_SECONDS), 3)
"""… on 16,384 GPUs in 54 days: 0.173 of each GPU in a year."""


def checkpoint_bytes(trained_weights: int) -> int:
    """Return the size of a checkpoint: trained weights and both means in float32."""
    return STATE_TENSORS * FLOAT32 * trained_weights


def seconds_between_failures(failures_per_gpu_year: float, gpus: int) -> float:
    """Return the mean time between failures of a job that each failing GPU ends."""
    return YEAR_SECONDS / (failures_per_gpu_year * gpus)


def best_interval_seconds(write_seconds: float, between_failures: float) -> float:
    """Return the seconds from one checkpoint to the next that lose least; see the module's text."""
    return (
        between_failures
        if write_seconds >= between_failures / 2
        else sqrt(2 * write_seconds * between_failures)
    )


def lost_share(interval_seconds: float, write_seconds: float, between_failures: float) -> float:
    """Return the share of the time that is lost, to first order: to writing, and to half an interval done again at each failure."""
    return write_seconds / interval_seconds + interval_seconds / (2 * between_failures)
