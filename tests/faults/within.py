"""Faults inside a rank: a loss that is not a number, a row that cannot be read, memory that does not suffice."""

import time
from random import Random

from faults.trial import EVERY, STEPS, Outcome, Site, Trial, last_line


def nan_on_one_rank(site: Site, random: Random) -> Outcome:
    """Let one rank's loss be NaN: all stop before the optimiser's step, and the step, the rank and its examples are named."""
    step, rank = random.randrange(EVERY + 1, STEPS), random.randrange(2)
    return _struck(
        site,
        f"nan:{step}:{rank}",
        step,
        f"the loss of step {step} is nan on rank {rank}, whose examples are ",
    )


def unreadable_row(site: Site, random: Random) -> Outcome:
    """Let a row fail to be read in the middle of an epoch: it is named."""
    step = random.randrange(EVERY + 1, STEPS)
    return _struck(
        site,
        f"row:{step}:{random.randrange(2)}",
        step,
        f", of step {step}, cannot be read (OSError: [Errno 5] Input/output error)",
    )


def no_memory(site: Site, random: Random) -> Outcome:
    """Let a rank get no more memory, in a whole run: what would need less is said."""
    trial, step = site.run(), random.randrange(EVERY + 1, STEPS)
    clear, since = exceed_memory(trial, step, random.randrange(2))
    return trial.go_on(done=step - 1, since=since, said=last_line(trial.said()), clear=clear)


def exceed_memory(trial: Trial, step: int, rank: int) -> tuple[bool, float]:
    """Begin a whole run whose memory does not suffice at a step; tell whether it says so with what would do, and when it struck."""
    trial.begin(strike=f"memory:{step}:{rank}")
    trial.wait_for(lambda: trial.steps() == step - 1)
    since = time.monotonic()
    status, said = trial.ended(), last_line(trial.said())
    named = (
        f"step {step} needs more memory than there is, with" in said
        and "less memory is needed with" in said
    )
    return status == 2 and named, since


def _struck(site: Site, strike: str, step: int, words: str) -> Outcome:
    trial = site.training()
    trial.begin(strike)
    trial.wait_for(lambda: trial.steps() == step - 1)
    since = time.monotonic()
    status, said = trial.ended(), last_line(trial.said())
    clear = (
        status != 0 and words in said and trial.steps() == step - 1 and bool(trial.checkpoints())
    )
    return trial.go_on(done=step - 1, since=since, said=said, clear=clear)
