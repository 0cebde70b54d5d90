"""Which configurations are tried on which subjects."""

from collections import Counter

from parity.matrix.catalog import SUBJECTS
from parity.matrix.configurations import CONFIGURATIONS, Configuration
from parity.matrix.subjects import Subject

Pair = tuple[Subject, Configuration]


def pairs_of(*, quick: bool) -> list[Pair]:
    """Return the cases; the quick ones have every subject and every configuration at least once."""
    pairs = [
        (subject, configuration)
        for subject in SUBJECTS
        for configuration in CONFIGURATIONS
        if configuration.applies_to(subject)
    ]
    return _spread(pairs) if quick else pairs


def _spread(pairs: list[Pair]) -> list[Pair]:
    """Return pairs in which every subject and every configuration occurs, with few repetitions."""
    uses: Counter[str] = Counter()
    chosen: set[tuple[str, str]] = set()
    for configuration in CONFIGURATIONS:
        able = [subject for subject, other in pairs if other is configuration]
        subject = min(able, key=lambda one: uses[one.name])
        uses[subject.name] += 1
        chosen.add((subject.name, configuration.name))
    for subject in SUBJECTS:
        if not uses[subject.name]:
            chosen.add((subject.name, CONFIGURATIONS[0].name))
    return [pair for pair in pairs if (pair[0].name, pair[1].name) in chosen]
