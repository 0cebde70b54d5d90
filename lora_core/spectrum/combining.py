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
    update: Update

    def dense(self) -> Tensor:
        return self.weight * self.update.dense()


@dataclass(frozen=True)
class _CombineOptions:
    rank: int
    density: float
    seed: int


class _Result(NamedTuple):
    update: Update
    relative_error: float


_Combine = Callable[[str, list[_Contribution], _CombineOptions], _Result]


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
    options = _CombineOptions(rank or 0, density or 0.0, seed or 0)
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
    return _Result(truncate(total, min(total.rank, *total.shape)), 0.0)


def _svd(name: str, contributions: list[_Contribution], options: _CombineOptions) -> _Result:
    total = _cat(name, contributions, options).update
    rank = min(options.rank, total.rank)
    return _Result(truncate(total, rank), truncation_error(singular_values(total), rank))


def _ties(name: str, contributions: list[_Contribution], options: _CombineOptions) -> _Result:
    """Trim each update to its largest entries, elect signs, average the entries that agree."""
    trimmed = torch.stack([_trimmed(each.dense(), options.density) for each in contributions])
    agrees = trimmed.sign() == trimmed.sum(0).sign()  # if the votes cancel, only zeros agree
    total = (trimmed * agrees).sum(0)
    return _truncated(total / agrees.sum(0).clamp(min=1), options.rank)


def _dare(name: str, contributions: list[_Contribution], options: _CombineOptions) -> _Result:
    """Keep each entry with probability `density` and divide it by `density`.

    The expectation of each entry does not change.
    """
    dropped = torch.stack([_dropped(name, each, options) for each in contributions])
    return _truncated(dropped.sum(0), options.rank)


_METHODS: dict[str, tuple[_Combine, set[str]]] = {
    "cat": (_cat, set()),
    "svd": (_svd, {"rank"}),
    "ties": (_ties, {"rank", "density"}),
    "dare": (_dare, {"rank", "density", "seed"}),
}
"""Method → its function and the options that it requires."""


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """Return `delta` with only the fraction `density` of its entries, the largest in magnitude."""
    count = max(1, round(density * delta.numel()))
    largest = delta.abs().flatten().topk(count).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[largest] = True
    return delta * mask.view_as(delta)


def _dropped(name: str, contribution: _Contribution, options: _CombineOptions) -> Tensor:
    delta = contribution.dense()
    generator = generator_for(f"{contribution.adapter}:{name}", options.seed)
    mask = torch.empty_like(delta, dtype=torch.bool)
    mask.bernoulli_(options.density, generator=generator)
    return delta * mask / options.density


def _truncated(delta: Tensor, rank: int) -> _Result:
    factors = factorize(delta, min(rank, *delta.shape))
    return _Result(Update(factors.a, factors.b, 1.0), factors.relative_error)


def _contributions(
    name: str, adapters: Sequence[Mapping[str, Update]], weights: Sequence[float]
) -> list[_Contribution]:
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


def _select(method: str, **options: float | None) -> _Combine:
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
    given = {name for name, value in options.items() if value is not None}
    if given != required:
        raise ConfigError(
            f"method {method!r} takes {_listed(required)} and was given {_listed(given)}; "
            "give exactly what it takes"
        )
    _check_options(options["rank"], options["density"])
    return combine_layer


def _check_options(rank: float | None, density: float | None) -> None:
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
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(
            f"{len(weights)} weights for {len(adapters)} adapters; "
            "give one weight for each of at least one adapter"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights={list(weights)} must be finite; choose numbers such as 0.5")


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names)) or "no option"
