"""Truncate an adapter to lower ranks: the best update of each rank, and its error in advance.

The best approximation of ΔW by rank k keeps its k largest singular values (Eckart & Young 1936);
its relative error is ‖σ after k‖ / ‖σ‖ and follows from the singular values alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_core.adapter.adapter_files import pattern_for
from lora_core.errors import AdapterError, ConfigError
from lora_core.spectrum.derived_adapter import write_updates
from lora_core.spectrum.spectrum import rank_for_energy, singular_values, thin_svd, truncation_error
from lora_core.spectrum.updates import Update, read_updates


@dataclass(frozen=True)
class TruncationRow:
    """The cost of truncating every layer of an adapter to one rank."""

    rank: int
    mean_error: float
    """Relative Frobenius error of ΔW, mean over the layers."""
    max_error: float
    """The same for the layer that loses most."""
    energy: float
    """Retained fraction of the squared norm, summed over all updates."""
    weights: int
    """Weights of the truncated adapter."""


def truncate(update: Update, rank: int) -> Update:
    """Return the update of `rank` closest to ΔW, which is never formed.

    The scale does not change, and the factors have equal norms.

    Args:
        update: returned unchanged if it has that rank already.
        rank: at least 1; a rank above min(out, in) is reduced to it without loss.

    Raises:
        ConfigError: the rank is below 1 or above the update's.
    """
    if not 1 <= rank <= update.rank:
        raise ConfigError(
            f"rank {rank} for an update of rank {update.rank} must be from 1 to {update.rank}; "
            "truncation cannot add directions"
        )
    if rank == update.rank:
        return update
    svd = thin_svd(update)
    b, a = svd.factors(rank, update.scale)
    return Update(a.float(), b.float(), update.scale)


def truncate_adapter(
    folder: Path,
    destination: Path,
    rank: int | Mapping[str, int],
) -> dict[str, float]:
    """Write the adapter of `folder`, truncated to `rank`, to `destination` in PEFT's format.

    Args:
        folder: the adapter; unchanged.
        destination: created or replaced.
        rank: one for all layers (lower ranks do not change), or module path → rank (other layers
            do not change).

    Returns:
        Module path → relative Frobenius error of its ΔW.

    Raises:
        AdapterError: the adapter cannot be read, or `rank` names a module that it lacks.
        ConfigError: a rank is below 1 or above its layer's, or no layer has a higher rank.
    """
    updates = read_updates(folder)
    if isinstance(rank, int):
        ranks = _ranks_for_all(updates, rank, folder)
    else:
        ranks = _ranks_by_name(updates, rank, folder)
    truncated = {}
    errors = {}
    for name, update in updates.items():
        new_rank = ranks[name]
        values = singular_values(update)
        truncated[name] = truncate(update, new_rank)
        errors[name] = truncation_error(values, new_rank)
    derived_by = f"truncated to rank {_formatted(ranks)}"
    write_updates(destination, truncated, like=folder, derived_by=derived_by)
    return errors


def recommended_ranks(folder: Path, fraction: float = 0.9) -> dict[str, int]:
    """Return the smallest rank of each layer that retains a fraction of its squared norm.

    Pass the result to `truncate_adapter`, or through `rank_pattern` to the config of a new run.

    Args:
        folder: the adapter.
        fraction: of Σσ² of each layer, above 0 and at most 1.

    Returns:
        Module path → rank.

    Raises:
        AdapterError: the adapter cannot be read.
        ConfigError: the fraction is out of range.
    """
    ranks = {}
    for name, update in read_updates(folder).items():
        values = singular_values(update)
        ranks[name] = rank_for_energy(values, fraction)
    return ranks


def rank_pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return ranks as a LoraConfig's rank_pattern: each key matches one module.

    Args:
        ranks: module path → rank.
    """
    return {pattern_for(name, ranks): rank for name, rank in ranks.items()}


def truncation_table(folder: Path, ranks: Iterable[int]) -> list[TruncationRow]:
    """Predict the cost of truncating an adapter to each of several ranks.

    Layers of a lower rank do not change.

    Args:
        folder: the adapter.
        ranks: the ranks to compare, each at least 1.

    Returns:
        One row per rank, in the given order.

    Raises:
        AdapterError: the adapter cannot be read.
        ConfigError: a rank is below 1.
    """
    updates = read_updates(folder)
    values = {name: singular_values(update) for name, update in updates.items()}
    return [_row(rank, updates, values) for rank in ranks]


def _row(
    rank: int,
    updates: Mapping[str, Update],
    values: Mapping[str, Tensor],
) -> TruncationRow:
    """Return the cost of one rank, given the singular values of each update."""
    if rank < 1:
        raise ConfigError(
            f"rank {rank} must be at least 1; give the ranks to compare, such as 1, 2, 4, 8"
        )
    errors = []
    weights = 0
    for name, update in updates.items():
        error = truncation_error(values[name], rank)
        errors.append(error)
        new_rank = min(rank, update.rank)
        weights += new_rank * sum(update.shape)
    total = _energy_after(0, values)
    energy = 1.0
    if total:
        energy = 1 - _energy_after(rank, values) / total
    return TruncationRow(
        rank=rank,
        mean_error=sum(errors) / len(errors),
        max_error=max(errors),
        energy=energy,
        weights=weights,
    )


def _energy_after(rank: int, values: Mapping[str, Tensor]) -> float:
    """Return Σσ² of the singular values of all layers after the first `rank` of each."""
    total = 0.0
    for of_layer in values.values():
        lost = of_layer[rank:].square().sum()
        total += float(lost)
    return total


def _ranks_for_all(updates: Mapping[str, Update], rank: int, folder: Path) -> dict[str, int]:
    """Return the new rank of each layer for one limit, which must truncate a layer."""
    largest = max(update.rank for update in updates.values())
    if rank >= largest:
        raise ConfigError(
            f"rank {rank} truncates nothing of {folder}, whose largest rank is {largest}; "
            "choose a lower one"
        )
    return {name: min(rank, update.rank) for name, update in updates.items()}


def _ranks_by_name(
    updates: Mapping[str, Update],
    ranks: Mapping[str, int],
    folder: Path,
) -> dict[str, int]:
    """Return the new rank of each layer; one that `ranks` does not name keeps its rank."""
    unknown = sorted(ranks.keys() - updates.keys())
    if unknown:
        raise AdapterError(
            f"{folder} has no update of {unknown[0]}; "
            f"it has {len(updates)}, such as {next(iter(updates))}"
        )
    return {name: ranks.get(name, update.rank) for name, update in updates.items()}


def _formatted(ranks: Mapping[str, int]) -> str:
    lowest = min(ranks.values())
    highest = max(ranks.values())
    if lowest == highest:
        return str(lowest)
    return f"{lowest} to {highest} by layer"
