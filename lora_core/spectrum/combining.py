"""Combine several adapters of one base: a weighted sum of their updates ΔW, layer by layer.

| method | ΔW                                                                   | rank         |
|--------|----------------------------------------------------------------------|--------------|
| cat    | Σ wᵢ ΔWᵢ, exact: concatenated factors                                | sum of ranks |
| svd    | the same, truncated to its best approximation                        | chosen       |
| ties   | mean of the entries that agree with the elected sign, truncated      | chosen       |
| dare   | Σ wᵢ ΔWᵢ with entries dropped at random, the rest scaled, truncated  | chosen       |

Each update counts with its own scale, whatever rule produced it. If an adapter lacks a layer, its
ΔW is 0 there. Summing the A's and the B's separately is not offered: (B₁ + B₂)(A₁ + A₂) contains
B₁A₂ and B₂A₁, which no adapter learned.

Sources: TIES (Yadav et al. 2023, arXiv 2306.01708), trimmed here per layer; DARE (Yu et al. 2023,
arXiv 2311.03099).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import AdapterError, ConfigError
from lora_core.init.random import generator_for
from lora_core.spectrum.spectrum import factorize, singular_values, truncation_error
from lora_core.spectrum.truncation import truncate
from lora_core.spectrum.updates import Update

Method = Literal["cat", "svd", "ties", "dare"]


@dataclass(frozen=True)
class Combined:
    """One adapter made of several."""

    updates: dict[str, Update]
    relative_errors: dict[str, float]
    """Module path → relative Frobenius error of the truncation; 0 if nothing was truncated.

    Near 1 for dare at a low density: its dropped entries are noise of full rank, and truncation
    mostly removes that noise.
    """


@dataclass(frozen=True, eq=False)
class _Contribution:
    """One adapter's update of a layer."""

    adapter: int
    """Index of the adapter."""
    weight: float
    """Factor of the update in the sum."""
    update: Update

    def dense(self) -> Tensor:
        """Return w · ΔW, (out, in), in float32."""
        return self.weight * self.update.dense()


@dataclass(frozen=True)
class _CombineOptions:
    """The options of all methods; 0 for one that the method does not use."""

    rank: int
    density: float
    seed: int


class _Result(NamedTuple):
    """The combined update of one layer."""

    update: Update
    relative_error: float
    """Relative Frobenius error of the truncation."""


_Combine = Callable[[str, list[_Contribution], _CombineOptions], _Result]


class _Method(NamedTuple):
    """How one method combines the contributions to a layer."""

    combine_layer: _Combine
    required: set[str]
    """The options that it requires."""


def combine(
    adapters: Sequence[Mapping[str, Update]],
    weights: Sequence[float],
    *,
    method: Method,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Combined:
    """Combine adapters of one base, each a mapping of module path → update.

    Args:
        adapters: at least one; `updates.read_over_one_base` reads them and refuses different bases.
        weights: one per adapter; a negative weight subtracts an update.
        method: see the module; ties and dare form one dense ΔW per layer and adapter, in float32.
        rank: of the result, for svd, ties and dare; smaller for a layer that needs or allows less.
        density: fraction of the entries that ties and dare keep, above 0 and at most 1.
        seed: of the entries that dare drops.

    Raises:
        ConfigError: an unknown method, an option that is missing or not used, or invalid weights.
        AdapterError: two adapters update one layer with different shapes.
    """
    combine_layer = _select(method, rank=rank, density=density, seed=seed)
    _check_weights(adapters, weights)
    options = _CombineOptions(
        rank=rank or 0,
        density=density or 0.0,
        seed=seed or 0,
    )
    updates = {}
    relative_errors = {}
    for name in sorted(set().union(*adapters)):
        contributions = _contributions(name, adapters, weights)
        updates[name], relative_errors[name] = combine_layer(name, contributions, options)
    return Combined(updates, relative_errors)


def _cat(name: str, contributions: list[_Contribution], options: _CombineOptions) -> _Result:
    """Concatenate the factors; a rank above the weight's smaller side is reduced without loss."""
    a = []
    b = []
    for contribution in contributions:
        folded = contribution.update.folded()
        a.append(folded.a)
        b.append(contribution.weight * folded.b)
    total = Update(torch.cat(a), torch.cat(b, dim=1), 1.0)
    rank = min(total.rank, *total.shape)
    return _Result(truncate(total, rank), relative_error=0.0)


def _svd(name: str, contributions: list[_Contribution], options: _CombineOptions) -> _Result:
    """Truncate the exact sum to its best approximation."""
    total = _cat(name, contributions, options).update
    rank = min(options.rank, total.rank)
    values = singular_values(total)
    return _Result(truncate(total, rank), truncation_error(values, rank))


def _ties(name: str, contributions: list[_Contribution], options: _CombineOptions) -> _Result:
    """Trim each update to its largest entries, elect signs, average the entries that agree."""
    deltas = [_trimmed(each.dense(), options.density) for each in contributions]
    trimmed = torch.stack(deltas)
    elected = trimmed.sum(0).sign()
    agrees = trimmed.sign() == elected  # if the votes cancel, only zeros agree
    total = (trimmed * agrees).sum(0)
    voters = agrees.sum(0).clamp(min=1)
    return _truncated(total / voters, options.rank)


def _dare(name: str, contributions: list[_Contribution], options: _CombineOptions) -> _Result:
    """Keep each entry with probability `density` and divide it by `density`.

    The expectation of each entry does not change.
    """
    deltas = [_dropped(name, each, options) for each in contributions]
    total = torch.stack(deltas).sum(0)
    return _truncated(total, options.rank)


_METHODS = {
    "cat": _Method(_cat, set()),
    "svd": _Method(_svd, {"rank"}),
    "ties": _Method(_ties, {"rank", "density"}),
    "dare": _Method(_dare, {"rank", "density", "seed"}),
}


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """Return `delta` with only the fraction `density` of its entries, the largest in magnitude."""
    size = delta.numel()
    count = max(1, round(density * size))
    magnitudes = delta.abs().flatten()
    largest = magnitudes.topk(count).indices
    mask = torch.zeros(size, dtype=torch.bool)
    mask[largest] = True
    return delta * mask.view_as(delta)


def _dropped(name: str, contribution: _Contribution, options: _CombineOptions) -> Tensor:
    """Return w · ΔW with entries dropped at random and the others divided by `density`."""
    delta = contribution.dense()
    generator = generator_for(f"{contribution.adapter}:{name}", options.seed)
    mask = torch.empty_like(delta, dtype=torch.bool)
    mask.bernoulli_(options.density, generator=generator)
    return delta * mask / options.density


def _truncated(delta: Tensor, rank: int) -> _Result:
    """Return the best approximation of `delta` (out, in) by `rank`, or by less if that is exact."""
    factors = factorize(delta, min(rank, *delta.shape))
    update = Update(factors.a, factors.b, 1.0)
    return _Result(update, factors.relative_error)


def _contributions(
    name: str,
    adapters: Sequence[Mapping[str, Update]],
    weights: Sequence[float],
) -> list[_Contribution]:
    """Return the updates of one layer by the adapters that have it."""
    found = []
    for index, adapter in enumerate(adapters):
        if name in adapter:
            found.append(_Contribution(index, weights[index], adapter[name]))
    shapes = {each.update.shape for each in found}
    if len(shapes) > 1:
        raise AdapterError(
            f"{name} is updated with the shapes {sorted(shapes)}; combine adapters of one base"
        )
    return found


def _select(
    method: str,
    *,
    rank: int | None,
    density: float | None,
    seed: int | None,
) -> _Combine:
    """Return the function of `method` if the options are exactly those that it requires."""
    if method == "linear":
        raise ConfigError(
            "method 'linear' sums the A's and the B's separately, "
            "which multiplies B of one adapter by A of another; "
            "use 'cat', which is exact, or 'svd' for a rank of your choice"
        )
    if method not in _METHODS:
        raise ConfigError(f"method={method!r} is unknown; use one of {', '.join(_METHODS)}")
    combine_layer, required = _METHODS[method]
    options = {"rank": rank, "density": density, "seed": seed}
    given = {name for name, value in options.items() if value is not None}
    if given != required:
        raise ConfigError(
            f"method {method!r} takes {_listed(required)} and was given {_listed(given)}; "
            "give exactly what it takes"
        )
    _check_options(rank, density)
    return combine_layer


def _check_options(rank: int | None, density: float | None) -> None:
    """Check the values of the options that are given."""
    if rank is not None and rank < 1:
        raise ConfigError(
            f"rank {rank} must be at least 1; the largest rank of the adapters is a common choice"
        )
    if density is not None and not 0 < density <= 1:
        raise ConfigError(
            f"density={density} must be above 0 and at most 1; "
            "TIES keeps 0.2 and DARE 0.1 of the entries in their papers"
        )


def _check_weights(adapters: Sequence[Mapping[str, Update]], weights: Sequence[float]) -> None:
    """Check that there is a finite weight for each of at least one adapter."""
    adapter_count = len(adapters)
    if adapter_count == 0 or adapter_count != len(weights):
        raise ConfigError(
            f"{len(weights)} weights for {adapter_count} adapters; "
            "give one weight for each of at least one adapter"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights={list(weights)} must be finite; choose numbers such as 0.5")


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names)) or "no option"
