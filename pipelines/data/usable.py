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
        """Return the sum of a column of numbers over some of the usable examples.

        Args:
            name: of a column of numbers.
            rows: which usable examples; indices into them.
        """
        return int(self.numbers(name)[rows].sum())

    def select(self, rows: Indices, columns: Sequence[str]) -> Dataset:
        """Return some of the usable examples.

        Args:
            rows: which usable examples; indices into them.
            columns: to keep.
        """
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
        has_end = self.numbers("end_token") != NO_TOKEN
        is_complete = self.numbers("was_cut") == 0
        return int((has_end & is_complete)[rows].sum())

    @property
    def notes(self) -> dict[str, int]:
        """Return observation → number of examples."""
        lists = self.table.data.column("notes").take(self.index)
        counted = pc.value_counts(pc.list_flatten(lists))
        observations = counted.field("values").to_pylist()
        numbers = counted.field("counts").to_pylist()
        by_observation = Counter[str](dict(zip(observations, numbers, strict=True)))
        return dict(by_observation.most_common())


def usable_examples(sources: Sequence[EncodedSource], settings: DataSection) -> UsableExamples:
    """Return the examples that can be learned.

    Args:
        sources: all of the recipe, and the user's validation rows.
        settings: what happens with bad rows and long examples.

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
    weights = np.repeat([source.weight for source in sources], sizes)
    removed = _Removed(table, is_bad, is_left_out)
    removed.check_remains(~held_out, repr(settings.title), settings.max_tokens)
    removed.check_remains(held_out, "validation", settings.max_tokens)
    index = np.flatnonzero(removed.is_usable)
    return UsableExamples(
        table=table,
        index=index,
        held_out=held_out[index],
        weights=weights[index],
        bad_rows=int(is_bad.sum()),
        left_out=int(is_left_out.sum()),
    )


def _column(table: Dataset, name: str) -> Indices:
    return np.asarray(table.data.column(name))


def _texts_at(table: Dataset, name: str, rows: Indices) -> list[str]:
    """Return some values of a text column."""
    values: list[str] = table.data.column(name).take(rows).to_pylist()
    return values


@dataclass(frozen=True)
class _Removed:
    """Which entries of a table are not used."""

    table: Dataset
    is_bad: Mask
    """Those that cannot be learned as written."""
    is_left_out: Mask
    """Those without a supervised token, or removed because of their length."""

    @property
    def is_usable(self) -> Mask:
        return ~self.is_bad & ~self.is_left_out

    def check_remains(self, rows: Mask, name: str, max_tokens: int) -> None:
        """Check that some of the rows can be learned, if there are any.

        Args:
            rows: entries of the table.
            name: of their source, in the message.
            max_tokens: the limit that may have left out completions.

        Raises:
            DataError: none can.
        """
        if not rows.any() or (rows & self.is_usable).any():
            return
        bad = np.flatnonzero(rows & self.is_bad)
        left_out = int((rows & self.is_left_out).sum())
        first = ""
        if len(bad):
            place, error = self._first_error(bad)
            first = f" ({place} {error})"
        raise DataError(
            f"none of the {len(bad) + left_out:,} rows of {name} can be learned: {len(bad):,} "
            f"cannot be read as written{first} and {left_out:,} have no completion left within "
            f"max_tokens={max_tokens}; raise it or use shorter prompts, or fix the rows"
        )

    def _first_error(self, bad: Indices) -> tuple[str, str]:
        """Return place and error of the first of these entries."""
        [place] = _texts_at(self.table, "place", bad[:1])
        [error] = _texts_at(self.table, "error", bad[:1])
        return place, error


def _check_rows(table: Dataset, is_bad: Mask) -> None:
    """Raise DataError with the first rows that cannot be learned, by reason, and their number."""
    bad = np.flatnonzero(is_bad)
    if not len(bad):
        return
    errors = _texts_at(table, "error", bad)
    places = _texts_at(table, "place", bad)
    places_of: dict[str, list[str]] = defaultdict(list)
    for error, place in zip(errors, places, strict=True):
        places_of[error].append(place)
    listed = []
    for error, rows in islice(places_of.items(), LISTED):
        others = ""
        if len(rows) > 1:
            others = f" (and {len(rows) - 1:,} more)"
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
    [first_place] = _texts_at(table, "place", long[:1])
    raise DataError(
        f"{len(long):,} examples have more than data.max_tokens {max_tokens} tokens, the first "
        f"in {first_place} and the longest with {lengths.max():,}; raise max_tokens, or set "
        "data.long_examples to truncate or drop"
    )
