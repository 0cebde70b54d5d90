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
from lora_core.spectrum.spectrum import rank_for_energy, singular_values, thin_svd, truncation_error
from lora_core.spectrum.updates import Update, read_updates, write_updates


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
    b, a = thin_svd(update).factors(rank, update.scale)
    return Update(a.float(), b.float(), update.scale)


def truncate_adapter(
    folder: Path, destination: Path, rank: int | Mapping[str, int]
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
        truncated[name] = truncate(update, ranks[name])
        errors[name] = truncation_error(singular_values(update), ranks[name])
    derived_by = f"truncated to rank {_formatted(ranks)}"
    write_updates(destination, truncated, like=folder, derived_by=derived_by)
    return errors


def recommended_ranks(folder: Path, fraction: float = 0.9) -> dict[str, int]:
    """Return, per module path, the smallest rank that retains `fraction` of the squared norm.

    Pass the result to `truncate_adapter`, or through `rank_pattern` to the config of a new run.
    """
    return {
        name: rank_for_energy(singular_values(update), fraction)
        for name, update in read_updates(folder).items()
    }


def rank_pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return ranks by module path as a LoraConfig's rank_pattern: each key matches one module."""
    return {pattern_for(name, ranks): rank for name, rank in ranks.items()}


def truncation_table(folder: Path, ranks: Iterable[int]) -> list[TruncationRow]:
    """Predict the cost of truncating the adapter of `folder` to each of `ranks`.

    Layers of a lower rank do not change.
    """
    updates = read_updates(folder)
    values = {name: singular_values(update) for name, update in updates.items()}
    return [_row(rank, updates, values) for rank in ranks]


def _row(rank: int, updates: Mapping[str, Update], values: Mapping[str, Tensor]) -> TruncationRow:
    if rank < 1:
        raise ConfigError(
            f"rank {rank} must be at least 1; give the ranks to compare, such as 1, 2, 4, 8"
        )
    errors = []
    weights = 0
    for name, update in updates.items():
        errors.append(truncation_error(values[name], rank))
        weights += min(rank, update.rank) * sum(update.shape)
    total = _energy_after(0, values)
    lost = _energy_after(rank, values)
    return TruncationRow(
        rank=rank,
        mean_error=sum(errors) / len(errors),
        max_error=max(errors),
        energy=1 - lost / total if total else 1.0,
        weights=weights,
    )


def _energy_after(rank: int, values: Mapping[str, Tensor]) -> float:
    return sum(float(each[rank:].square().sum()) for each in values.values())


def _ranks_for_all(updates: Mapping[str, Update], rank: int, folder: Path) -> dict[str, int]:
    largest = max(update.rank for update in updates.values())
    if rank >= largest:
        raise ConfigError(
            f"rank {rank} truncates nothing of {folder}, whose largest rank is {largest}; "
            "choose a lower one"
        )
    return {name: min(rank, update.rank) for name, update in updates.items()}


def _ranks_by_name(
    updates: Mapping[str, Update], ranks: Mapping[str, int], folder: Path
) -> dict[str, int]:
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
    return f"{lowest}" if lowest == highest else f"{lowest} to {highest} by layer"
