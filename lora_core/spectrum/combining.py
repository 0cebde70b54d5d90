"""Several adapters of one base as one: a weighted sum of their updates ΔW, layer by layer.

| method | ΔW                                                             | rank          |
|--------|----------------------------------------------------------------|---------------|
| cat    | Σ wᵢ ΔWᵢ, exact: the factors side by side                      | sum of ranks  |
| svd    | the same, cut to the nearest of a rank                         | chosen        |
| ties   | the entries that agree with the elected sign, averaged, cut    | chosen        |
| dare   | Σ wᵢ ΔWᵢ with entries dropped at random, the rest scaled, cut  | chosen        |

Each update counts with its own scale, whatever rule made it. A layer that an adapter lacks has ΔW = 0 there. Adding
the A's and the B's apart is not offered: (B₁ + B₂)(A₁ + A₂) also holds B₁A₂ and B₂A₁, which no adapter learned.

Sources: TIES (Yadav et al. 2023, arXiv 2306.01708), trimmed here per layer; DARE (Yu et al. 2023, arXiv 2311.03099).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_core.errors import AdapterError, ConfigError
from lora_core.init.random import generator_for
from lora_core.spectrum.spectrum import factorise, singular_values, truncation_error
from lora_core.spectrum.truncation import truncate
from lora_core.spectrum.updates import Update

Method = Literal["cat", "svd", "ties", "dare"]


@dataclass(frozen=True)
class Combined:
    """One adapter made of several."""

    updates: dict[str, Update]
    relative_errors: dict[str, float]
    """Module path → relative Frobenius error that the cut to a rank made; 0 where nothing was cut.

    Near 1 for dare at a low density, whose dropped entries are noise of full rank: what the cut loses is mostly that noise.
    """


@dataclass(frozen=True, eq=False)
class _Part:
    """What one adapter brings to a layer."""

    adapter: int
    weight: float
    update: Update

    def dense(self) -> Tensor:
        return self.weight * self.update.dense()


@dataclass(frozen=True)
class _Options:
    rank: int
    density: float
    seed: int


_Result = tuple[Update, float]


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
        weights: one for each adapter; a negative one takes an update away.
        method: see the module; ties and dare form one dense ΔW per layer and adapter, in float32.
        rank: of the result, for svd, ties and dare; a layer that needs or allows no more gets less.
        density: share of the entries that ties and dare keep, above 0 and at most 1.
        seed: of the entries that dare drops.

    Raises:
        ConfigError: an unknown method, an option that it lacks or does not take, or weights that do not fit.
        AdapterError: two adapters update one layer with different shapes.
    """
    make = _maker(method, rank=rank, density=density, seed=seed)
    _check_weights(adapters, weights)
    options = _Options(rank or 0, density or 0.0, seed or 0)
    results = {
        name: make(name, _parts(name, adapters, weights), options)
        for name in sorted(set().union(*adapters))
    }
    return Combined(
        {name: update for name, (update, _) in results.items()},
        {name: error for name, (_, error) in results.items()},
    )


def _cat(name: str, parts: list[_Part], options: _Options) -> _Result:
    """Put the factors side by side; a rank above the smaller side of the weight comes down to it without loss."""
    folded = [(part.weight, part.update.folded()) for part in parts]
    whole = Update(
        torch.cat([update.a for _, update in folded]),
        torch.cat([weight * update.b for weight, update in folded], dim=1),
        1.0,
    )
    return truncate(whole, min(whole.rank, *whole.shape)), 0.0


def _svd(name: str, parts: list[_Part], options: _Options) -> _Result:
    whole, _ = _cat(name, parts, options)
    rank = min(options.rank, whole.rank)
    return truncate(whole, rank), truncation_error(singular_values(whole), rank)


def _ties(name: str, parts: list[_Part], options: _Options) -> _Result:
    """Trim each update to its largest entries, elect a sign per entry, average the entries that have it."""
    trimmed = torch.stack([_trimmed(part.dense(), options.density) for part in parts])
    agrees = trimmed.sign() == trimmed.sum(0).sign()  # where votes cancel, only zeros agree
    return _cut((trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1), options.rank)


def _dare(name: str, parts: list[_Part], options: _Options) -> _Result:
    """Keep each entry with the chance `density` and divide it by that chance, so that its expectation stays."""
    return _cut(torch.stack([_dropped(name, part, options) for part in parts]).sum(0), options.rank)


_METHODS: dict[str, tuple[Callable[[str, list[_Part], _Options], _Result], set[str]]] = {
    "cat": (_cat, set()),
    "svd": (_svd, {"rank"}),
    "ties": (_ties, {"rank", "density"}),
    "dare": (_dare, {"rank", "density", "seed"}),
}


def _trimmed(delta: Tensor, density: float) -> Tensor:
    """Return `delta` with all but the share `density` of its entries, the largest in magnitude, set to zero."""
    kept = delta.abs().flatten().topk(max(1, round(density * delta.numel()))).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[kept] = True
    return delta * mask.view_as(delta)


def _dropped(name: str, part: _Part, options: _Options) -> Tensor:
    delta, generator = part.dense(), generator_for(f"{part.adapter}:{name}", options.seed)
    return (
        delta
        * torch.empty_like(delta, dtype=torch.bool).bernoulli_(options.density, generator=generator)
        / options.density
    )


def _cut(delta: Tensor, rank: int) -> _Result:
    factors = factorise(delta, min(rank, *delta.shape))
    return Update(factors.a, factors.b, 1.0), factors.relative_error


def _parts(
    name: str, adapters: Sequence[Mapping[str, Update]], weights: Sequence[float]
) -> list[_Part]:
    present = enumerate(zip(adapters, weights, strict=True))
    parts = [
        _Part(number, weight, adapter[name])
        for number, (adapter, weight) in present
        if name in adapter
    ]
    shapes = {part.update.shape for part in parts}
    if len(shapes) > 1:
        raise AdapterError(
            f"{name} is updated with the shapes {sorted(shapes)}; combine adapters of one base"
        )
    return parts


def _maker(method: str, **options: float | None) -> Callable[[str, list[_Part], _Options], _Result]:
    """Return the function of `method` once its options are what it takes."""
    if method == "linear":
        raise ConfigError(
            "method 'linear' adds the A's and the B's apart, which puts B of one adapter before A of another; "
            "use 'cat', which is exact, or 'svd' for a rank of your choice"
        )
    if method not in _METHODS:
        raise ConfigError(f"method={method!r} is unknown; use one of {', '.join(_METHODS)}")
    make, taken = _METHODS[method]
    given = {name for name, value in options.items() if value is not None}
    if given != taken:
        raise ConfigError(
            f"method {method!r} takes {_spelt(taken)} and was given {_spelt(given)}; give exactly what it takes"
        )
    rank, density = options["rank"], options["density"]
    if rank is not None and rank < 1:
        raise ConfigError(
            f"rank {rank} must be at least 1; the largest rank of the adapters is a common choice"
        )
    if density is not None and not 0 < density <= 1:
        raise ConfigError(
            f"density={density} must lie above 0 and at most at 1; TIES keeps 0.2 and DARE 0.1 of the entries in their papers"
        )
    return make


def _check_weights(adapters: Sequence[Mapping[str, Update]], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(
            f"{len(weights)} weights for {len(adapters)} adapters; give one weight for each of at least one adapter"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights={list(weights)} must be finite; choose numbers such as 0.5")


def _spelt(names: set[str]) -> str:
    return " and ".join(sorted(names)) or "no option"
