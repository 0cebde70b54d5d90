"""Evaluation items whose text is in the training data: their scores would not measure ability.

An item counts if a training example contains one of its runs of 13 consecutive words, the length
that Brown et al. (2020, arXiv 2005.14165, appendix C) use, or all of its words if it is shorter
(but at least 8).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.evaluation.items import Item

RUN_WORDS = 13
MIN_WORDS = 8
WORD = re.compile(r"\w+")
Run = tuple[str, ...]


@dataclass(frozen=True)
class ContaminationIndex:
    """The runs of words of all items, by their first words."""

    runs: Mapping[Run, Mapping[Run, tuple[int, ...]]]
    """First MIN_WORDS words → run → the items that have it."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> "ContaminationIndex":
        """Index the texts of items.

        Args:
            texts: question and right answer of each item; one with fewer than MIN_WORDS words is
                never found.
        """
        items_with: dict[Run, list[int]] = defaultdict(list)
        for index, text in enumerate(texts):
            words = _words(text)
            length = min(RUN_WORDS, len(words))
            if length < MIN_WORDS:
                continue
            for run in _runs(words, length):
                items_with[run].append(index)
        by_start: dict[Run, dict[Run, tuple[int, ...]]] = defaultdict(dict)
        for run, indices in items_with.items():
            start = run[:MIN_WORDS]
            by_start[start][run] = tuple(indices)
        return cls(dict(by_start))

    def matches(self, text: str) -> set[int]:
        """Return the items of which a run is in a text.

        Args:
            text: of a training example.

        Returns:
            indices into the texts that were indexed.
        """
        words = _words(text)
        found: set[int] = set()
        for start, first_words in enumerate(_runs(words, MIN_WORDS)):
            candidates = self.runs.get(first_words, {})
            for run, items in candidates.items():
                words_here = words[start : start + len(run)]
                if tuple(words_here) == run:
                    found.update(items)
        return found


@dataclass(frozen=True)
class ItemText:
    """Question and right answer of an evaluation item."""

    benchmark: str
    text: str

    @classmethod
    def of(cls, item: Item) -> "ItemText":
        """Return the text of an item with choices."""
        choice = item.choices[item.gold]
        return cls(item.benchmark, f"{item.context}{choice.lead}{choice.scored}")


def contaminated(items: Sequence[ItemText], training_texts: Iterable[str]) -> dict[str, int]:
    """Return benchmark → number of its items whose text is in the training data.

    Args:
        items: of all benchmarks.
        training_texts: of each training example; read once.
    """
    index = ContaminationIndex.of([item.text for item in items])
    found: set[int] = set()
    for text in training_texts:
        found |= index.matches(text)
    counts = Counter(items[position].benchmark for position in found)
    return dict(sorted(counts.items()))


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _runs(words: Sequence[str], length: int) -> Iterable[Run]:
    for start in range(len(words) - length + 1):
        yield tuple(words[start : start + length])
