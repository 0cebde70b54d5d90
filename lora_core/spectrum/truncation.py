"""Cut an adapter to lower ranks: the best update of each rank, and what the cut will cost, told before it is made.

The best approximation of ΔW by rank k keeps its k largest singular values (Eckart & Young 1936); the relative error is
‖σ after k‖ / ‖σ‖ and is known from the singular values alone.
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
    """What cutting every layer of an adapter to one rank would cost."""

    rank: int
    mean_error: float
    """Relative Frobenius error of ΔW, mean over the layers."""
    max_error: float
    """The same for the layer that loses most."""
    energy: float
    """Share of the squared norm of all updates together that is kept."""
    weights: int
    """Weights of the adapter after the cut."""


def truncate(update: Update, rank: int) -> Update:
    """Return the update of `rank` closest to ΔW, which is never formed; the scale stays and the factors are balanced.

    Args:
        update: returned as it is where it has that rank already.
        rank: at least 1; one above min(out, in) comes down to it without loss.

    Raises:
        ConfigError: the rank is below 1 or above the update's.
    """
    if not 1 <= rank <= update.rank:
        raise ConfigError(
            f"rank {rank} for an update of rank {update.rank} must lie in 1 to {update.rank}; a cut cannot add directions"
        )
    if rank == update.rank:
        return update
    b, a = thin_svd(update).factors(rank, update.scale)
    return Update(a.float(), b.float(), update.scale)


def truncate_adapter(
    folder: Path, destination: Path, rank: int | Mapping[str, int]
) -> dict[str, float]:
    """Write the adapter of `folder`, cut to `rank`, to `destination` in PEFT's format.

    Args:
        folder: the adapter; unchanged.
        destination: created or replaced.
        rank: one for all layers (those below it stay), or module path → rank (layers not named stay).

    Returns:
        Module path → relative Frobenius error of its ΔW.

    Raises:
        AdapterError: the adapter cannot be read, or `rank` names a module that it lacks.
        ConfigError: a rank is below 1 or above its layer's, or one for all that cuts nothing.
    """
    updates = read_updates(folder)
    ranks = (
        _ranks_for_all(updates, rank, folder)
        if isinstance(rank, int)
        else _ranks_by_name(updates, rank, folder)
    )
    cut = {name: truncate(update, ranks[name]) for name, update in updates.items()}
    write_updates(destination, cut, like=folder, done=f"truncated to rank {_spelt(ranks)}")
    return {
        name: truncation_error(singular_values(update), ranks[name])
        for name, update in updates.items()
    }


def recommended_ranks(folder: Path, share: float = 0.9) -> dict[str, int]:
    """Return, for each module path, the smallest rank that keeps `share` of its update's squared norm.

    The result can be given to `truncate_adapter`, or, by `rank_pattern`, to the config of a next training.
    """
    return {
        name: rank_for_energy(singular_values(update), share)
        for name, update in read_updates(folder).items()
    }


def rank_pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return ranks by module path as the rank_pattern of a LoraConfig: each key decides for its module alone."""
    return {pattern_for(name, ranks): rank for name, rank in ranks.items()}


def truncation_table(folder: Path, ranks: Iterable[int]) -> list[TruncationRow]:
    """Predict what cutting the adapter of `folder` to each of `ranks` would cost; a layer below a rank stays as it is."""
    updates = read_updates(folder)
    values = {name: singular_values(update) for name, update in updates.items()}
    return [_row(rank, updates, values) for rank in ranks]


def _row(rank: int, updates: Mapping[str, Update], values: Mapping[str, Tensor]) -> TruncationRow:
    if rank < 1:
        raise ConfigError(
            f"rank {rank} must be at least 1; give the ranks to compare, such as 1, 2, 4, 8"
        )
    errors = [truncation_error(each, rank) for each in values.values()]
    total = sum(float(each.square().sum()) for each in values.values())
    lost = sum(float(each[rank:].square().sum()) for each in values.values())
    return TruncationRow(
        rank=rank,
        mean_error=sum(errors) / len(errors),
        max_error=max(errors),
        energy=1 - lost / total if total else 1.0,
        weights=sum(min(rank, update.rank) * sum(update.shape) for update in updates.values()),
    )


def _ranks_for_all(updates: Mapping[str, Update], rank: int, folder: Path) -> dict[str, int]:
    largest = max(update.rank for update in updates.values())
    if rank >= largest:
        raise ConfigError(
            f"rank {rank} cuts nothing from {folder}, whose largest is {largest}; choose a lower one"
        )
    return {name: min(rank, update.rank) for name, update in updates.items()}


def _ranks_by_name(
    updates: Mapping[str, Update], ranks: Mapping[str, int], folder: Path
) -> dict[str, int]:
    unknown = sorted(ranks.keys() - updates.keys())
    if unknown:
        raise AdapterError(
            f"{folder} has no update of {unknown[0]}; it has {len(updates)}, such as {next(iter(updates))}"
        )
    return {name: ranks.get(name, update.rank) for name, update in updates.items()}


def _spelt(ranks: Mapping[str, int]) -> str:
    lowest, highest = min(ranks.values()), max(ranks.values())
    return f"{lowest}" if lowest == highest else f"{lowest} to {highest} by layer"
