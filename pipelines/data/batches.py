"""Which examples make up which step, and how they are distributed over processes.

The order is drawn once from the seed and does not depend on the number of processes: step k takes the same examples
everywhere. Within a step they are distributed so that each process gets about as many tokens.
"""

import random
from collections.abc import Sequence


def order(examples: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Return the indices of each step: epochs of the data, each in an order of its own."""
    wanted, drawn, epoch = steps * batch_size, list[int](), 0
    while len(drawn) < wanted:
        indices = list(range(examples))
        random.Random(f"{seed}:{epoch}").shuffle(indices)
        drawn += indices
        epoch += 1
    return [drawn[start : start + batch_size] for start in range(0, wanted, batch_size)]


def shares(indices: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deal `indices` into `parts` lists of about equal tokens: the longest first, each to the lightest part.

    Args:
        indices: examples of one step; at least `parts` of them.
        lengths: tokens of every example, by index.
        parts: processes × micro-batches.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        lightest = min(dealt, key=lambda part: (sum(lengths[i] for i in part), len(part)))
        lightest.append(index)
    return dealt
