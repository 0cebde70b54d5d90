"""Split examples by group: no group is in `train` and in another split.

Only the seed and the group decide on which side a group is. Rows that are added later therefore
move no group, and no later run trains on what an earlier run held out. If the user has validation
rows, these are held out instead, and training rows of their groups are removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError

HELD_OUT_FRACTION = 0.1
"""Fraction of the groups from which the validation examples are drawn."""
HASH_BITS = 64
FEWEST_SCORED = 2
"""A confidence interval needs two examples."""

Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Splits:
    """Which examples are trained on, scored, and used for tuning, by index."""

    train: Indices
    """One epoch in the order of the examples; an example with weight 2 occurs twice."""
    validation: Indices
    """On which models are compared."""
    tuning: Indices
    """On which a control's learning rate is chosen; disjoint from `validation`."""
    unused: int
    """Held-out examples in neither of the two, and training examples that a weight below 1 leaves
    out."""
    excluded: int
    """Training examples that were removed because a validation row of the user is in their
    group."""


def split_examples(
    groups: Sequence[str],
    keys: Sequence[str],
    *,
    own_validation: Mask | None,
    weights: Sequence[float],
    validation_examples: int,
    seed: int,
) -> Splits:
    """Split examples into train, validation and tuning.

    Without validation rows of the user, `validation_examples` are drawn from groups that the seed
    holds out, and up to as many of the remaining examples of those groups are for tuning. A tenth
    of the groups is held out, and more only if that tenth has too few examples.

    Args:
        groups: group of each example.
        keys: digest of each example, by which held-out examples are ordered.
        own_validation: whether an example is a validation row of the user; None if there are none.
        weights: how often each training example occurs in an epoch. A fraction adds that part of
            the examples with the same weight once more, drawn by the seed.
        validation_examples: number of examples to score. Fewer validation rows of the user are all
            scored.
        seed: of the drawing.

    Raises:
        DataError: too few rows or groups to hold that many out and still train on most.
    """
    group_hashes = _hashes("group", seed, groups)
    order = _hashes("order", seed, keys)
    if own_validation is None:
        splits = _split_by_seed(group_hashes, order, validation_examples)
    else:
        splits = _split_off_own(group_hashes, order, validation_examples, own_validation)
    epoch = _epoch(splits.train, order, np.asarray(weights, dtype=np.float64))
    left_out = len(splits.train) - len(np.unique(epoch))
    if not len(epoch):
        reason = f"the weights of the sources leave none of {left_out} training examples"
        raise DataError(f"{reason}; raise a weight")
    return replace(splits, train=epoch, unused=splits.unused + left_out)


def _split_by_seed(groups: Hashes, order: Hashes, wanted: int) -> Splits:
    """Hold out groups by the seed; `train` has each example once."""
    in_tenth, are_needed = _draw_groups(groups, wanted)
    held_out = in_tenth | are_needed
    candidates = _ordered(np.flatnonzero(held_out), order)
    train = np.flatnonzero(~held_out)
    if len(train) < wanted or len(candidates) < wanted:
        raise DataError(_too_few(groups, wanted))
    return Splits(
        train=train,
        validation=candidates[:wanted],
        tuning=candidates[wanted : 2 * wanted],
        unused=max(len(candidates) - 2 * wanted, 0),
        excluded=0,
    )


def _too_few(groups: Hashes, wanted: int) -> str:
    number = len(np.unique(groups))
    if number == 1 and len(groups) > 1:
        return (
            f"all {len(groups)} usable rows are in one group, so that none can be held out: rows "
            "with the same value of data.group_column are one group, and without it rows whose "
            "conversations start with the same question; name a column with several values, or "
            "provide rows with different questions"
        )
    return (
        f"{len(groups)} usable rows in {number} groups are too few to hold out "
        f"validation_examples={wanted} and train on at least as many; lower validation_examples or "
        "provide more rows"
    )


def _split_off_own(groups: Hashes, order: Hashes, wanted: int, own: Mask) -> Splits:
    """Hold out the user's validation rows; `train` has each example once.

    If all of them are scored, examples for tuning come from the training rows.
    """
    candidates = _ordered(np.flatnonzero(own), order)
    if len(candidates) < FEWEST_SCORED:
        raise DataError(
            f"{len(candidates)} usable validation rows are too few; provide at least "
            f"{FEWEST_SCORED}, or leave out the validation rows to hold out a part of the others"
        )
    is_excluded = ~own & np.isin(groups, groups[own])
    train = np.flatnonzero(~own & ~is_excluded)
    excluded = int(is_excluded.sum())
    validation = candidates[:wanted]
    tuning = candidates[wanted : 2 * wanted]
    unused = max(len(candidates) - 2 * wanted, 0)
    if len(tuning) == 0:
        in_tenth, are_needed = _draw_groups(groups[train], len(validation))
        held_out = in_tenth & are_needed
        tuning = _ordered(train[held_out], order)[: len(validation)]
        unused = int(held_out.sum()) - len(tuning)
        train = train[~held_out]
    if len(train) == 0:
        raise DataError(
            f"no training row is left: {excluded} rows are in the groups of {len(candidates)} "
            "validation rows and were removed; provide training rows with other questions, or set "
            "data.group_column"
        )
    return Splits(train, validation, tuning, unused, excluded)


def _draw_groups(groups: Hashes, wanted: int) -> tuple[Mask, Mask]:
    """Return which examples are in the first tenth of the groups in the order of their hashes.

    Second, which are in the first groups that have at least `wanted` examples together.
    """
    hashes, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    in_tenth = hashes / 2.0**HASH_BITS < HELD_OUT_FRACTION
    are_needed = np.cumsum(sizes) - sizes < wanted
    return in_tenth[group_of], are_needed[group_of]


def _epoch(train: Indices, order: Hashes, weights: NDArray[np.float64]) -> Indices:
    """Return the training examples as often as their weights require."""
    train_weights = weights[train]
    times = np.floor(train_weights).astype(np.int64)
    for weight in np.unique(train_weights):
        members = np.flatnonzero(train_weights == weight)
        fraction = weight % 1
        extra = int(np.floor(fraction * len(members) + 0.5))
        drawn = np.argsort(order[train[members]], kind="stable")
        times[members[drawn[:extra]]] += 1
    return np.repeat(train, times)


def _ordered(indices: Indices, order: Hashes) -> Indices:
    return indices[np.argsort(order[indices], kind="stable")]


def _hashes(purpose: str, seed: int, texts: Sequence[str]) -> Hashes:
    """Return a 64-bit number for each text that depends only on the purpose, the seed and the text.

    Two groups with the same number are one group, which does no harm.
    """
    prefix = blake2b(f"{purpose}:{seed}:".encode(), digest_size=HASH_BITS // 8)
    digests = bytearray()
    for text in texts:
        state = prefix.copy()
        state.update(text.encode("utf-8", "surrogatepass"))
        digests += state.digest()
    return np.frombuffer(bytes(digests), dtype=">u8").astype(np.uint64)
