"""Plain LoRA of a chosen rank that approximates an adapter, exactly or with a reported error.

DoRA rescales the rows of W + s·B A, so its change W' − W has full rank, and the base is needed. The
best approximation of a rank keeps the largest singular values (Eckart & Young 1936). The relative
error of a layer is ‖W' − W − B A‖ / ‖W' − W‖ in the Frobenius norm; that of the adapter counts all
layers as one matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.adapter.contents import AdapterContents
from lora_core.adapter.key_layouts import MAGNITUDE
from lora_core.adapter.renaming import Rename
from lora_core.errors import ConfigError, ExportError
from lora_core.merging.adapted_weights import AdaptedWeight, adapted_weights
from lora_core.spectrum.leading import leading_svd
from lora_core.spectrum.spectrum import singular_values
from lora_core.spectrum.truncation import truncate
from lora_core.spectrum.updates import Update


@dataclass(frozen=True, eq=False)
class Approximation:
    """A plain update in place of a weight's change."""

    update: Update
    size: float
    """Frobenius norm of the change."""
    error: float
    """Frobenius norm of what the update lacks of it."""

    @property
    def relative_error(self) -> float:
        return self.error / self.size if self.size else 0.0


def refit(
    contents: AdapterContents,
    base: Path,
    rank: int | None = None,
    renames: Sequence[Rename] = (),
) -> dict[str, Approximation]:
    """Approximate the change of every adapted weight, under DoRA with its row norms.

    Args:
        contents: of the adapter.
        base: folder of the dense base.
        rank: of each update, at most the smaller side of its weight; None keeps the adapter's.
        renames: see `merge_checkpoint`.

    Returns:
        Module path → approximation.

    Raises:
        ConfigError: the rank is below 1.
        ExportError: the adapter trains more than its updates and magnitudes.
        AdapterError, CheckpointError, MergeError: see `adapted_weights`.
    """
    _check_rank(rank)
    _refuse_more(contents)
    with adapted_weights(contents, base, renames) as weights:
        return {name: _approximate(weights[name], rank) for name in weights}


def truncated(updates: Mapping[str, Update], rank: int) -> dict[str, Approximation]:
    """Truncate updates to `rank`; lower ranks do not change.

    Raises:
        ConfigError: the rank is below 1.
    """
    _check_rank(rank)
    found: dict[str, Approximation] = {}
    for name, update in updates.items():
        kept = min(rank, update.rank)
        values = singular_values(update)
        size, error = float(values.norm()), float(values[kept:].norm())
        found[name] = Approximation(truncate(update, kept), size, error)
    return found


def overall_error(approximations: Mapping[str, Approximation]) -> float:
    """Return the relative error of all layers together."""
    total = sum(each.size**2 for each in approximations.values())
    lost = sum(each.error**2 for each in approximations.values())
    return (lost / total) ** 0.5 if total else 0.0


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank!r} must be at least 1; the adapter's rank is a usual choice")


def _refuse_more(contents: AdapterContents) -> None:
    """Refuse an adapter that trains what no low-rank update of a layer can express."""
    more = [key for key in contents.others if not key.endswith(MAGNITUDE)]
    more += sorted(contents.factors.keys() - contents.layers.keys())
    if more:
        raise ExportError(
            f"{contents.folder} holds {more[0]}, which no update of a linear layer can express; "
            "merge the adapter with PEFT, or train it without"
        )


def _approximate(adapted: AdaptedWeight, rank: int | None) -> Approximation:
    """Return the best update of `rank`; directions that the change lacks are zero."""
    change = adapted.merged().double() - adapted.weight.double()
    size = float(change.norm())
    chosen = min(rank or adapted.update.rank, *change.shape)
    b = torch.zeros(change.shape[0], chosen, dtype=torch.float64)
    a = torch.zeros(chosen, change.shape[1], dtype=torch.float64)
    if size:
        leading_b, leading_a = leading_svd(change, chosen).factors(chosen)
        b[:, : leading_b.shape[1]] = leading_b
        a[: leading_a.shape[0]] = leading_a
    error = float((change - b @ a).norm())
    return Approximation(Update(a.float(), b.float(), 1.0), size, error)
