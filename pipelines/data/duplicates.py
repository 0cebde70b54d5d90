"""Find held-out examples that resemble training examples.

The few held-out examples are indexed and the training examples are streamed, so that memory does
not grow with them. A text is the set of its shingles: runs of three tokens. MinHash (Broder, 1997)
with locality-sensitive hashing proposes pairs; their Jaccard similarity |A∩B|/|A∪B| is then
computed exactly. Shingles that most held-out examples share, such as those of a chat template or a
system prompt, do not count.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
BATCH_EXAMPLES = 1000
SHOWN_EXAMPLES = 3
SHOWN_CHARACTERS = 80
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ divided by the golden ratio, whose multiples are spread evenly (Knuth)."""

Numbers = NDArray[np.int64]
Shingles = NDArray[np.uint64]


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


class _TokenBatch:
    """Examples as one array of tokens."""

    def __init__(self, examples: pa.ListArray) -> None:
        self.tokens: Numbers = examples.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        self.lengths = examples.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        self.ends = np.cumsum(self.lengths)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the tokens of each example as bytes, by which examples are compared."""
        for end, length in zip(self.ends, self.lengths, strict=True):
            yield self.tokens[end - length : end].tobytes()

    def shingles(self) -> tuple[Shingles, Numbers]:
        """Return the hashes of all shingles, and the index of the example of each."""
        example_of = np.repeat(np.arange(len(self.lengths)), self.lengths)
        positions = max(len(self.tokens) - SHINGLE_TOKENS + 1, 0)
        hashes = np.zeros(positions, dtype=np.uint64)
        for offset in range(SHINGLE_TOKENS):
            hashes *= MULTIPLIER
            hashes += self.tokens[offset : offset + positions].astype(np.uint64)
            hashes ^= hashes >> np.uint64(29)
        last = example_of[SHINGLE_TOKENS - 1 :]
        is_inside = example_of[:positions] == last
        return hashes[is_inside], last[is_inside]


class _ExactIndex:
    """Held-out examples by their tokens."""

    def __init__(self, held_out: Sequence[list[int]]) -> None:
        self._keys = list(_TokenBatch(_as_lists(held_out)))
        self._seen: set[bytes] = set()

    def add(self, train: _TokenBatch) -> None:
        """Compare training examples."""
        self._seen |= set(train).intersection(self._keys)

    @property
    def found(self) -> NDArray[np.bool_]:
        """Return which held-out examples have the tokens of a training example."""
        return np.array([key in self._seen for key in self._keys], dtype=bool)


class _NearIndex:
    """Held-out examples by their shingles."""

    def __init__(self, held_out: Sequence[list[int]]) -> None:
        shingles, example_of = _distinct(*_TokenBatch(_as_lists(held_out)).shingles())
        known, number_of, examples = np.unique(shingles, return_inverse=True, return_counts=True)
        is_common = examples > max(len(held_out) / 2, 1)
        self._known: Shingles = known
        self._common: Shingles = known[is_common]
        counts = ~is_common[number_of]
        shingles, example_of = shingles[counts], example_of[counts]
        shape = (len(held_out), len(known))
        self._members = _incidence(example_of, number_of[counts], shape)
        self._sizes = np.bincount(example_of, minlength=len(held_out))
        self._lsh = _index(shingles, example_of)
        self.found = np.zeros(len(held_out), dtype=bool)

    def add(self, train: _TokenBatch) -> None:
        """Compare training examples."""
        shingles, example_of = train.shingles()
        counts = ~_is_in(shingles, self._common)
        shingles, example_of = shingles[counts], example_of[counts]
        signatures, row_of = _signatures(shingles, example_of)
        proposed = np.array(self._lsh.query_duplicate_flags_matrix(signatures), dtype=bool)
        if proposed.any():
            is_proposed = proposed[row_of]
            self._compare(shingles[is_proposed], row_of[is_proposed], len(proposed))

    def _compare(self, shingles: Shingles, row_of: Numbers, rows: int) -> None:
        """Compute the similarity of training examples to the held-out examples."""
        shingles, row_of = _distinct(shingles, row_of)
        sizes = np.bincount(row_of, minlength=rows)
        is_known = _is_in(shingles, self._known)
        number_of = np.searchsorted(self._known, shingles[is_known])
        members = _incidence(row_of[is_known], number_of, (rows, len(self._known)))
        shared = (members @ self._members.T).tocoo()
        union = sizes[shared.row] + self._sizes[shared.col] - shared.data
        self.found[shared.col[shared.data >= SIMILARITY * union]] = True


def _index(shingles: Shingles, example_of: Numbers) -> RMinHashLSH:
    """Return an index that reports rows with a candidate."""
    lsh = RMinHashLSH(SIMILARITY, PERMUTATIONS, BANDS)
    signatures, _ = _signatures(shingles, example_of)
    # The library reports a row with more than one candidate, so every row is indexed twice.
    lsh.insert_matrix(signatures, 0)
    lsh.insert_matrix(signatures, signatures.len())
    return lsh


def _signatures(shingles: Shingles, example_of: Numbers) -> tuple[RMinHashDigestMatrix, Numbers]:
    """Return the MinHash of each example that has shingles, and the row of each shingle in it.

    Args:
        shingles: those of one example after those of the other.
        example_of: the example of each, in ascending order.
    """
    _, row_of, sizes = np.unique(example_of, return_inverse=True, return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, offsets, PERMUTATIONS, HASH_SEED
    )
    return matrix, row_of


def _distinct(shingles: Shingles, example_of: Numbers) -> tuple[Shingles, Numbers]:
    """Return each shingle of an example once, in the order of the examples."""
    order = np.lexsort((shingles, example_of))
    shingles, example_of = shingles[order], example_of[order]
    is_first = np.ones(len(shingles), dtype=bool)
    is_first[1:] = (shingles[1:] != shingles[:-1]) | (example_of[1:] != example_of[:-1])
    return shingles[is_first], example_of[is_first]


def _is_in(shingles: Shingles, ascending: Shingles) -> NDArray[np.bool_]:
    """Return which shingles are in the other array; faster than `np.isin`, which sorts both."""
    if len(ascending) == 0:
        return np.zeros(len(shingles), dtype=bool)
    places = np.minimum(np.searchsorted(ascending, shingles), len(ascending) - 1)
    return np.equal(ascending[places], shingles)


def _incidence(rows: Numbers, columns: Numbers, shape: tuple[int, int]) -> csr_array:
    """Return a sparse matrix with a one for each pair of a row and a column."""
    return csr_array((np.ones(len(rows), dtype=np.int64), (rows, columns)), shape=shape)


def _batches(train: Dataset | Iterable[list[int]]) -> Iterator[_TokenBatch]:
    """Yield the training examples in batches."""
    if isinstance(train, Dataset):
        columns = train.select_columns(["input_ids"]).with_format("arrow")
        for table in columns.iter(BATCH_EXAMPLES):
            yield _TokenBatch(table["input_ids"].combine_chunks())
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
