"""A damaged adapter never loads silently: it is refused, or the damage does not affect the output.

The damage and the counts are those of `make parity`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from parity.damage import BY_FORM, CUTS, FLIPS, KINDS, Kind, bare, swapped
from parity.tally import Tally, tally
from torch import Tensor, nn
from transformers import LlamaForCausalLM

Count = Callable[..., Tally]


@pytest.fixture
def count(
    build_llama: Callable[..., LlamaForCausalLM],
    adapter_folder: Path,
    logits: Callable[[nn.Module], Tensor],
) -> Count:
    """Return a function that counts the outcomes of loading adapters damaged in one way."""

    def of(kind: Kind, *, sidecar: bool = True) -> Tally:
        damages = kind(adapter_folder)
        if not sidecar:
            damages = bare(damages)
        return tally(damages, adapter_folder, build_llama, logits)

    return of


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_with_a_sidecar_no_damage_loads_silently(count: Count, kind: Kind) -> None:
    found = count(kind)
    assert found.silent == 0
    if found.tried in (FLIPS, CUTS):
        # The sidecar's lineage and tensor digests do not affect the output.
        assert found.refused > 0.9 * found.tried * 2 / 3
    else:
        assert found.refused == found.tried > 0


@pytest.mark.parametrize("kind", BY_FORM.values(), ids=BY_FORM.keys())
def test_without_a_sidecar_a_misfit_is_refused(count: Count, kind: Kind) -> None:
    found = count(kind, sidecar=False)
    assert found.silent == 0
    # A key that the header names twice for its own bytes, or with PEFT's adapter name, is not
    # damaged.
    assert found.refused >= 0.7 * found.tried > 0


def test_a_silent_load_is_counted(count: Count) -> None:
    """Without a sidecar nothing distinguishes two tensors of one shape.

    This shows that the zeros above are meaningful.
    """
    found = count(swapped, sidecar=False)
    assert found.silent == found.tried > 0
