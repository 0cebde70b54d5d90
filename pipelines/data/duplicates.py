"""Find held-out examples that resemble training examples.

The few held-out examples are indexed and the training examples are streamed, so that memory does
not grow with them. A text is the set of its shingles: runs of three tokens. MinHash (Broder, 1997)
with locality-sensitive hashing proposes pairs; their Jaccard similarity |A∩B|/|A∪B| is then
computed exactly. Shingles that most held-out examples share, such as those of a chat template or a
system prompt, do not count.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashDigestMatrix, RMinHashLSH
from scipy.sparse import csr_array

from pipelines.runtime.interfaces.results import SplitOverlap

SHINGLE_TOKENS = 3
SIMILARITY = 0.8
"""Smallest Jaccard similarity of a near duplicate."""
PERMUTATIONS = 128
BANDS = 32
"""A pair is proposed with probability 1 - (1 - s⁴)³²: 0.99999 at a similarity s of 0.75, and
0.0002 at 0.05."""
HASH_SEED = 1
INPUT_IDS = "input_ids"
BATCH_EXAMPLES = 1000
SHOWN_EXAMPLES = 3
SHOWN_CHARACTERS = 80
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ divided by the golden ratio, whose multiples are spread evenly (Knuth)."""
SHIFT = np.uint64(29)
"""Bits by which a hash is shifted to mix its upper half into its lower half."""

Numbers = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Flags = NDArray[np.bool_]


def overlap(
    train: Dataset | Iterable[list[int]],
    held_out: Sequence[list[int]],
    *,
    decode: Callable[[list[int]], str],
) -> SplitOverlap:
    """Return how many held-out examples are in the training data, exactly or nearly.

    Args:
        train: a data set with a column `input_ids`, or token ids of each example.
        held_out: token ids of each held-out example.
        decode: returns the text of token ids.
    """
    exact = _ExactIndex(held_out)
    near = _NearIndex(held_out)
    for batch in _batches(train):
        exact.add(batch)
        near.add(batch)
    near_only = near.found & ~exact.found
    shown = np.flatnonzero(exact.found | near_only)[:SHOWN_EXAMPLES]
    endings = [_ending(decode(list(held_out[index]))) for index in shown]
    return SplitOverlap(
        exact=int(exact.found.sum()),
        near=int(near_only.sum()),
        examples=tuple(endings),
    )


@dataclass(frozen=True)
class _Shingles:
    """The shingles of some examples, S in all."""

    hashes: Hashes
    """(S,)"""
    example_of: Numbers
    """(S,) index of the example of each, in ascending order."""

    def where(self, is_selected: Flags) -> "_Shingles":
        """Return those that an array of flags, (S,), selects."""
        return _Shingles(self.hashes[is_selected], self.example_of[is_selected])

    def distinct(self) -> "_Shingles":
        """Return each shingle of an example once, in the order of the examples."""
        order = np.lexsort((self.hashes, self.example_of))
        hashes = self.hashes[order]
        example_of = self.example_of[order]
        is_first = np.ones(len(hashes), dtype=bool)
        is_other_hash = hashes[1:] != hashes[:-1]
        is_other_example = example_of[1:] != example_of[:-1]
        is_first[1:] = is_other_hash | is_other_example
        return _Shingles(hashes[is_first], example_of[is_first])

    def count_by_example(self, examples: int) -> Numbers:
        """Return the number of shingles of each of `examples` examples."""
        return np.bincount(self.example_of, minlength=examples)


class _TokenBatch:
    """Examples as one array of tokens."""

    def __init__(self, examples: pa.ListArray) -> None:
        tokens = examples.flatten().to_numpy(zero_copy_only=False)
        lengths = examples.value_lengths().to_numpy(zero_copy_only=False)
        self.tokens: Numbers = tokens.astype(np.int64)
        self.lengths: Numbers = lengths.astype(np.int64)
        self.ends = np.cumsum(self.lengths)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the tokens of each example as bytes, by which examples are compared."""
        for end, length in zip(self.ends, self.lengths, strict=True):
            yield self.tokens[end - length : end].tobytes()

    def shingles(self) -> _Shingles:
        """Return all shingles, also those that an example has more than once."""
        positions = max(len(self.tokens) - SHINGLE_TOKENS + 1, 0)
        hashes = np.zeros(positions, dtype=np.uint64)
        for offset in range(SHINGLE_TOKENS):
            tokens = self.tokens[offset : offset + positions]
            hashes *= MULTIPLIER
            hashes += tokens.astype(np.uint64)
            hashes ^= hashes >> SHIFT
        examples = np.arange(len(self.lengths))
        example_of_token = np.repeat(examples, self.lengths)
        first = example_of_token[:positions]
        last = example_of_token[SHINGLE_TOKENS - 1 :]
        # A run of tokens that begins in one example and ends in the next is not a shingle.
        return _Shingles(hashes, last).where(first == last)


class _ExactIndex:
    """Held-out examples by their tokens."""

    def __init__(self, held_out: Sequence[list[int]]) -> None:
        self._keys = list(_TokenBatch(_as_lists(held_out)))
        self._seen: set[bytes] = set()

    def add(self, train: _TokenBatch) -> None:
        """Compare training examples."""
        self._seen |= set(train).intersection(self._keys)

    @property
    def found(self) -> Flags:
        """Return which held-out examples have the tokens of a training example."""
        is_seen = [key in self._seen for key in self._keys]
        return np.array(is_seen, dtype=bool)


class _NearIndex:
    """Held-out examples by their shingles."""

    def __init__(self, held_out: Sequence[list[int]]) -> None:
        shingles = _TokenBatch(_as_lists(held_out)).shingles().distinct()
        known, number_of, examples = np.unique(
            shingles.hashes, return_inverse=True, return_counts=True
        )
        is_common = examples > max(len(held_out) / 2, 1)
        counts = ~is_common[number_of]
        counted = shingles.where(counts)
        self._known: Hashes = known
        """In ascending order; a shingle's number is its index here."""
        self._common: Hashes = known[is_common]
        """Those that do not count."""
        self._members = _incidence(
            counted.example_of, number_of[counts], rows=len(held_out), columns=len(known)
        )
        self._sizes = counted.count_by_example(len(held_out))
        self._lsh = _index(counted)
        self.found = np.zeros(len(held_out), dtype=bool)
        """Which held-out examples have a near duplicate."""

    def add(self, train: _TokenBatch) -> None:
        """Compare training examples."""
        shingles = train.shingles()
        counted = shingles.where(~_is_in(shingles.hashes, self._common))
        signatures, row_of = _signatures(counted)
        flags = self._lsh.query_duplicate_flags_matrix(signatures)
        is_proposed = np.array(flags, dtype=bool)
        if is_proposed.any():
            rows = _Shingles(counted.hashes, row_of)
            self._compare(rows.where(is_proposed[row_of]), len(is_proposed))

    def _compare(self, train: _Shingles, rows: int) -> None:
        """Compute the similarity of training examples to the held-out examples.

        Args:
            train: the shingles of proposed training examples.
            rows: number of training examples.
        """
        shingles = train.distinct()
        sizes = shingles.count_by_example(rows)
        in_both = shingles.where(_is_in(shingles.hashes, self._known))
        numbers = np.searchsorted(self._known, in_both.hashes)
        members = _incidence(in_both.example_of, numbers, rows=rows, columns=len(self._known))
        shared = (members @ self._members.T).tocoo()
        union = sizes[shared.row] + self._sizes[shared.col] - shared.data
        is_similar = shared.data >= SIMILARITY * union
        self.found[shared.col[is_similar]] = True


def _index(shingles: _Shingles) -> RMinHashLSH:
    """Return an index that reports rows with a candidate."""
    lsh = RMinHashLSH(SIMILARITY, PERMUTATIONS, BANDS)
    signatures, _ = _signatures(shingles)
    # The library reports a row with more than one candidate, so every row is indexed twice.
    lsh.insert_matrix(signatures, 0)
    lsh.insert_matrix(signatures, signatures.len())
    return lsh


def _signatures(shingles: _Shingles) -> tuple[RMinHashDigestMatrix, Numbers]:
    """Return the MinHash of each example that has shingles, and the row of each shingle in it."""
    _, row_of, sizes = np.unique(shingles.example_of, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    offsets = np.concatenate([[0], ends]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles.hashes, offsets, PERMUTATIONS, HASH_SEED
    )
    return matrix, row_of


def _is_in(hashes: Hashes, ascending: Hashes) -> Flags:
    """Return which hashes are in the other array; faster than `np.isin`, which sorts both."""
    if len(ascending) == 0:
        return np.zeros(len(hashes), dtype=bool)
    places = np.searchsorted(ascending, hashes)
    places = np.minimum(places, len(ascending) - 1)
    return np.equal(ascending[places], hashes)


def _incidence(row_of: Numbers, column_of: Numbers, *, rows: int, columns: int) -> csr_array:
    """Return a sparse matrix, (rows, columns), with a one for each pair of a row and a column."""
    ones = np.ones(len(row_of), dtype=np.int64)
    return csr_array((ones, (row_of, column_of)), shape=(rows, columns))


def _batches(train: Dataset | Iterable[list[int]]) -> Iterator[_TokenBatch]:
    """Yield the training examples in batches."""
    if isinstance(train, Dataset):
        only_ids = train.select_columns([INPUT_IDS]).with_format("arrow")
        for table in only_ids.iter(BATCH_EXAMPLES):
            yield _TokenBatch(table[INPUT_IDS].combine_chunks())
        return
    remaining = iter(train)
    while batch := list(islice(remaining, BATCH_EXAMPLES)):
        yield _TokenBatch(_as_lists(batch))


def _as_lists(examples: Sequence[list[int]]) -> pa.ListArray:
    return pa.array(examples, pa.list_(pa.int64()))


def _ending(text: str) -> str:
    """Return the last characters of a text in one line; many start with the same prompt."""
    line = " ".join(text.split())
    if len(line) <= SHOWN_CHARACTERS:
        return line
    return "…" + line[1 - SHOWN_CHARACTERS :]
