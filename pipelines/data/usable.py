"""Which examples are used: errors are reported together, and what is left out is counted."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from pipelines.config.data_section import DataSection
from pipelines.data.encoding_rows import NO_TOKEN, EncodedSource
from pipelines.errors import DataError

LISTED = 5
"""Reasons that an error lists."""
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
Weights = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class UsableExamples:
    """The examples of all sources that can be learned."""

    table: Dataset
    """All entries; see `pipelines.data.encoding_rows.FEATURES`."""
    index: Indices
    """The usable ones."""
    held_out: Mask
    """Of the usable ones, those of the user's own validation rows."""
    weights: Weights
    """How often each usable one occurs in an epoch."""
    bad_rows: int
    left_out: int
    """Examples without any supervised token left, or removed because of their length."""

    def texts(self, name: str) -> list[str]:
        """Return a text column of the usable examples."""
        values: list[str] = self.table.data.column(name).take(self.index).to_pylist()
        return values

    def numbers(self, name: str) -> Indices:
        """Return a column of numbers of the usable examples."""
        return _column(self.table, name)[self.index]

    def total(self, name: str, rows: Indices) -> int:
        """Return the sum of a column of numbers over some of the usable examples."""
        return int(self.numbers(name)[rows].sum())

    def select(self, rows: Indices, columns: Sequence[str]) -> Dataset:
        """Return some of the usable examples."""
        return self.table.select_columns(list(columns)).select(self.index[rows])

    @property
    def own_validation(self) -> Mask | None:
        """Return which examples are of the user's validation rows; None if there are none."""
        return self.held_out if self.held_out.any() else None

    @property
    def cut(self) -> int:
        """Return the number of truncated examples."""
        return int(self.numbers("was_cut").sum())

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Return the tokens that end an answer."""
        found = np.unique(self.numbers("end_token"))
        return tuple(int(token) for token in found if token != NO_TOKEN)

    def ends_supervised(self, rows: Indices) -> int:
        """Return how many of some examples are complete and teach the token that ends them."""
        ends = (self.numbers("end_token") != NO_TOKEN) & (self.numbers("was_cut") == 0)
        return int(ends[rows].sum())

    @property
    def notes(self) -> dict[str, int]:
        """Return observation → number of examples."""
        lists = self.table.data.column("notes").take(self.index)
        counts = pc.value_counts(pc.list_flatten(lists))
        found = Counter({one["values"].as_py(): one["counts"].as_py() for one in counts})
        return dict(found.most_common())


def usable_examples(sources: Sequence[EncodedSource], settings: DataSection) -> UsableExamples:
    """Return the examples that can be learned.

    Raises:
        DataError: rows cannot be learned as written, or are too long, and the recipe does not
            remove them; or nothing remains.
    """
    table = concatenate_datasets([source.examples for source in sources])
    is_bad = np.asarray(pc.not_equal(table.data.column("error"), ""))
    if settings.bad_rows == "error":
        _check_rows(table, is_bad)
    is_long = _column(table, "was_cut") & ~is_bad
    if settings.long_examples == "error":
        _check_lengths(table, is_long, settings.max_tokens)
    is_left_out = (_column(table, "supervised_tokens") == 0) & ~is_bad
    if settings.long_examples == "drop":
        is_left_out |= is_long
    sizes = [len(source.examples) for source in sources]
    held_out = np.repeat([source.held_out for source in sources], sizes)
    for rows, name in ((~held_out, repr(settings.title)), (held_out, "validation")):
        if rows.any() and not (rows & ~is_bad & ~is_left_out).any():
            raise _none_remains(table, rows & is_bad, rows & is_left_out, name, settings)
    index = np.flatnonzero(~is_bad & ~is_left_out)
    return UsableExamples(
        table=table,
        index=index,
        held_out=held_out[index],
        weights=np.repeat([source.weight for source in sources], sizes)[index],
        bad_rows=int(is_bad.sum()),
        left_out=int(is_left_out.sum()),
    )


def _column(table: Dataset, name: str) -> Indices:
    return np.asarray(table.data.column(name))


def _none_remains(
    table: Dataset, is_bad: Mask, is_left_out: Mask, name: str, settings: DataSection
) -> DataError:
    bad = np.flatnonzero(is_bad)
    first = ""
    if len(bad):
        entry = table[int(bad[0])]
        first = f" ({entry['place']} {entry['error']})"
    count = len(bad) + int(is_left_out.sum())
    return DataError(
        f"none of the {count:,} rows of {name} can be learned: {len(bad):,} cannot be read as "
        f"written{first} and {is_left_out.sum():,} have no completion left within "
        f"max_tokens={settings.max_tokens}; raise it or use shorter prompts, or fix the rows"
    )


def _check_rows(table: Dataset, is_bad: Mask) -> None:
    """Raise DataError with the first rows that cannot be learned, by reason, and their number."""
    bad = np.flatnonzero(is_bad)
    if not len(bad):
        return
    errors = table.data.column("error").take(bad).to_pylist()
    places = table.data.column("place").take(bad).to_pylist()
    places_of: dict[str, list[str]] = defaultdict(list)
    for error, place in zip(errors, places, strict=True):
        places_of[error].append(place)
    listed = []
    for error, rows in islice(places_of.items(), LISTED):
        others = f" (and {len(rows) - 1:,} more)" if len(rows) > 1 else ""
        listed.append(f"{rows[0]}{others} {error}")
    if len(bad) == 1:
        raise DataError(f"{listed[0]} (data.bad_rows: drop removes such rows)")
    more = ""
    if len(places_of) > LISTED:
        more = f"; and {len(places_of) - LISTED:,} other reasons"
    raise DataError(
        f"{len(bad):,} rows cannot be learned as written (data.bad_rows: drop removes them): "
        f"{'; '.join(listed)}{more}"
    )


def _check_lengths(table: Dataset, is_long: Mask, max_tokens: int) -> None:
    """Raise DataError if an example is too long."""
    long = np.flatnonzero(is_long)
    if not len(long):
        return
    lengths = _column(table, "length")[long]
    first = table[int(long[0])]
    raise DataError(
        f"{len(long):,} examples have more than data.max_tokens {max_tokens} tokens, the first "
        f"in {first['place']} and the longest with {lengths.max():,}; raise max_tokens, or set "
        "data.long_examples to truncate or drop"
    )
