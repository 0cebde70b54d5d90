"""A damaged adapter is never loaded silently: it is refused, or what was damaged is no part of what is computed.

The damages and the count are those of `make parity`.
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
    """Return a count of what a load makes of the damages of one kind."""

    def of(kind: Kind, *, sidecar: bool = True) -> Tally:
        damages = kind(adapter_folder)
        return tally(damages if sidecar else bare(damages), adapter_folder, build_llama, logits)

    return of


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_beside_its_sidecar_no_damage_is_loaded_silently(count: Count, kind: Kind) -> None:
    found = count(kind)
    assert found.silent == 0
    if found.tried in (
        FLIPS,
        CUTS,
    ):  # the sidecar's lineage and tensor digests decide nothing that is computed
        assert found.refused > 0.9 * found.tried * 2 / 3
    else:
        assert found.refused == found.tried > 0


@pytest.mark.parametrize("kind", BY_FORM.values(), ids=BY_FORM.keys())
def test_without_a_sidecar_what_does_not_fit_is_refused(count: Count, kind: Kind) -> None:
    found = count(kind, sidecar=False)
    assert found.silent == 0
    assert (
        found.refused >= 0.8 * found.tried > 0
    )  # a key named twice for its own bytes is no damage


def test_the_count_sees_a_silent_load(count: Count) -> None:
    """Without a sidecar nothing tells two tensors of one shape apart; were it not seen here, the zeros above would say nothing."""
    found = count(swapped, sidecar=False)
    assert found.silent == found.tried > 0
