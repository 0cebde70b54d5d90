"""Evaluation items whose text is in the training data: their scores would not measure ability.

An item counts if a training example contains one of its runs of 13 consecutive words, the length
that Brown et al. (2020, arXiv 2005.14165, appendix C) use, or all of its words if it is shorter
(but at least 8).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.evaluation.items import Item

RUN_WORDS = 13
MIN_WORDS = 8
WORD = re.compile(r"\w+")
Run = tuple[str, ...]


@dataclass(frozen=True)
class ContaminationIndex:
    """Runs of words → the items that have them."""

    items: Mapping[Run, tuple[int, ...]]
    lengths: tuple[int, ...]
    """Numbers of words of the runs."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> "ContaminationIndex":
        """Index the texts of items."""
        found: dict[Run, list[int]] = defaultdict(list)
        for index, text in enumerate(texts):
            words = _words(text)
            length = min(RUN_WORDS, len(words))
            if length < MIN_WORDS:
                continue
            for run in _runs(words, length):
                found[run].append(index)
        items = {run: tuple(indices) for run, indices in found.items()}
        lengths = tuple(sorted({len(run) for run in items}))
        return cls(items, lengths)

    def matches(self, text: str) -> set[int]:
        """Return the items of which a run is in a text."""
        words = _words(text)
        found: set[int] = set()
        for length in self.lengths:
            for run in _runs(words, length):
                found.update(self.items.get(run, ()))
        return found


def contaminated(items: Sequence[Item], training_texts: Iterable[str]) -> dict[str, int]:
    """Return benchmark → number of its items whose text is in the training data."""
    index = ContaminationIndex.of([_text_of(item) for item in items])
    found: set[int] = set()
    for text in training_texts:
        found |= index.matches(text)
    counts: dict[str, int] = defaultdict(int)
    for position in found:
        counts[items[position].benchmark] += 1
    return dict(sorted(counts.items()))


def _text_of(item: Item) -> str:
    """Return an item's question and its right answer."""
    choice = item.choices[item.gold]
    return f"{item.context}{choice.lead}{choice.scored}"


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _runs(words: Sequence[str], length: int) -> Iterable[Run]:
    for start in range(len(words) - length + 1):
        yield tuple(words[start : start + length])
