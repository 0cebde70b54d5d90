"""Faults inside a rank: a loss that is NaN, an unreadable row, too little memory."""

import time
from random import Random

from faults.trial import EVERY, STEPS, Outcome, Site, Trial, last_line


def nan_on_one_rank(site: Site, random: Random) -> Outcome:
    """Set one rank's loss to NaN: all ranks stop before the optimizer step.

    The error names the step, the rank and its examples.
    """
    step, rank = random.randrange(EVERY + 1, STEPS), random.randrange(2)
    return _struck(
        site,
        f"nan:{step}:{rank}",
        step,
        f"the loss of step {step} is nan on rank {rank}, whose examples are ",
    )


def unreadable_row(site: Site, random: Random) -> Outcome:
    """Let reading a row fail in the middle of an epoch: the error names the row."""
    step = random.randrange(EVERY + 1, STEPS)
    return _struck(
        site,
        f"row:{step}:{random.randrange(2)}",
        step,
        f", of step {step}, cannot be read (OSError: [Errno 5] Input/output error)",
    )


def no_memory(site: Site, random: Random) -> Outcome:
    """Refuse memory to a rank of a complete run: the error names settings that need less."""
    trial, step = site.run(), random.randrange(EVERY + 1, STEPS)
    clear, since = exceed_memory(trial, step, random.randrange(2))
    return trial.resume(done=step - 1, since=since, message=last_line(trial.output()), clear=clear)


def exceed_memory(trial: Trial, step: int, rank: int) -> tuple[bool, float]:
    """Start a run that exceeds memory at a step.

    Returns whether the error names settings that need less, and the time of the fault.
    """
    trial.start(strike=f"memory:{step}:{rank}")
    trial.wait_for(lambda: trial.steps() == step - 1)
    since = time.monotonic()
    status, message = trial.ended(), last_line(trial.output())
    named = (
        f"step {step} needs more memory than there is, with" in message
        and "less memory is needed with" in message
    )
    return status == 2 and named, since


def _struck(site: Site, strike: str, step: int, words: str) -> Outcome:
    trial = site.training()
    trial.start(strike)
    trial.wait_for(lambda: trial.steps() == step - 1)
    since = time.monotonic()
    status, message = trial.ended(), last_line(trial.output())
    clear = (
        status != 0 and words in message and trial.steps() == step - 1 and bool(trial.checkpoints())
    )
    return trial.resume(done=step - 1, since=since, message=message, clear=clear)
