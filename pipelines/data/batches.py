"""Which examples make up which step, and how they are distributed over processes.

The order is drawn once from the seed and does not depend on the number of processes: step k takes
the same examples everywhere. Within a step they are distributed so that each process gets about as
many tokens.
"""

import random
from collections.abc import Sequence


def order(examples: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Return the indices of each step: epochs of the data, each in its own order.

    Args:
        examples: number of training examples of an epoch.
        steps: number of optimizer steps.
        batch_size: examples per step, over all processes.
        seed: of the shuffles; each epoch has its own.

    Returns:
        `steps` lists of `batch_size` indices; a step can contain the end of one epoch and the start
        of the next.
    """
    wanted = steps * batch_size
    drawn: list[int] = []
    epoch = 0
    while len(drawn) < wanted:
        indices = list(range(examples))
        random.Random(f"{seed}:{epoch}").shuffle(indices)
        drawn += indices
        epoch += 1
    return [drawn[start : start + batch_size] for start in range(0, wanted, batch_size)]


def balance_by_tokens(
    indices: Sequence[int], lengths: Sequence[int], packs: int
) -> list[list[int]]:
    """Deal `indices` into `packs` lists of about equal tokens: longest first, to the lightest.

    Args:
        indices: examples of one step; at least `packs` of them.
        lengths: tokens of every example, by index.
        packs: processes × micro-batches.
    """
    balanced: list[list[int]] = [[] for _ in range(packs)]
    tokens = [0] * packs
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        lightest = min(range(packs), key=lambda number: (tokens[number], len(balanced[number])))
        balanced[lightest].append(index)
        tokens[lightest] += lengths[index]
    return balanced
