"""Count damaged adapters that are refused or load silently; test_fuzz.py asserts these counts."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from parity.cases import case
from parity.damage import BY_FORM, KINDS, OF_THE_FILES, bare
from parity.features import adapted
from parity.models import llama
from parity.rows import Row, at_most, figure
from parity.tally import Tally, tally


def damage_rows() -> Iterator[Row]:
    """Yield the counts of each kind of damage, with and without the sidecar."""
    one = case(llama)
    with TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        adapted(one, adapter)
        for name, kind in KINDS.items():
            found = tally(kind(adapter), adapter, one.base, one.logits)
            yield from _counts(name, found, must_hold=True)
        for name, kind in OF_THE_FILES.items():
            found = tally(bare(kind(adapter)), adapter, one.base, one.logits)
            yield from _counts(f"{name}, no sidecar", found, must_hold=name in BY_FORM)


def _counts(name: str, found: Tally, *, must_hold: bool) -> Iterator[Row]:
    yield figure(f"{name}: tried", found.tried)
    yield figure(f"{name}: refused", found.refused)
    yield figure(f"{name}: computes the same", found.same)
    silent = f"{name}: loaded silently"
    yield at_most(silent, found.silent, 0) if must_hold else figure(silent, found.silent)
