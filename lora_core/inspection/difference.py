"""How two adapters of one base differ, layer by layer, from their factors alone.

    inner product   ⟨ΔW₁, ΔW₂⟩ = s₁ s₂ Σ (B₁ᵀ B₂) ∘ (A₁ A₂ᵀ)
    difference      ΔW₁ − ΔW₂ = [s₁ B₁ | −s₂ B₂] [A₁ ; A₂], of rank r₁ + r₂
    overlap         mean of cos² θ over the principal angles θ between the spaces that the updates
                    read (right) or write (left): 1 if one contains the other, 0 if orthogonal

No (out, in) matrix is formed. Norms are Frobenius norms in float64.

Source: subspace similarity (LoRA, Hu et al. 2021, arXiv 2106.09685, section 7.2).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapter.contents import AdapterContents, read_contents
from lora_core.base.identity import UNCHANGED, by_kind, shares_any
from lora_core.errors import AdapterError
from lora_core.inspection.measuring import update_of
from lora_core.spectrum.spectrum import rank_of_update, singular_values, subspace_similarity
from lora_core.spectrum.updates import Update


@dataclass(frozen=True)
class UpdateDifference:
    """How the updates of one module differ."""

    module: str
    norms: tuple[float, float]
    """‖ΔW₁‖ and ‖ΔW₂‖; 0 for an adapter that does not update the module."""
    difference: float
    """‖ΔW₁ − ΔW₂‖."""
    ranks: tuple[int, int]
    """Numerical ranks of ΔW₁ and ΔW₂."""
    cosine: float | None
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); None if one is zero, as the next two."""
    overlap_right: float | None
    """Of the spaces that the updates read."""
    overlap_left: float | None
    """Of the spaces that the updates write."""


@dataclass(frozen=True)
class AdapterDifference:
    """How two adapters differ."""

    folders: tuple[str, str]
    same_base: bool | None
    """Whether their files record one base; None if one of them records none."""
    updates: tuple[UpdateDifference, ...]
    """One per module that either updates."""
    norms: tuple[float, float]
    """Of all updates together."""
    difference: float
    """Of all updates together."""
    cosine: float | None
    """Of all updates together; None if an adapter is zero."""
    other_tensors: Mapping[str, float | None]
    """Key of a tensor outside of the updates → Frobenius norm of the difference; None if only one
    adapter has it, or has it in another shape."""

    @property
    def is_zero(self) -> bool:
        """Whether the adapters change a model in the same way."""
        others = any(value is None or value > 0 for value in self.other_tensors.values())
        return self.difference == 0 and not others


@dataclass(frozen=True, eq=False)
class _Pair:
    """The updates of one module; None for an adapter that does not update it."""

    first: Update | None
    second: Update | None

    @property
    def inner_product(self) -> float:
        """⟨ΔW₁, ΔW₂⟩."""
        if self.first is None or self.second is None:
            return 0.0
        b_product = self.first.b.double().T @ self.second.b.double()
        a_product = self.first.a.double() @ self.second.a.double().T
        total = float((b_product * a_product).sum())
        return self.first.scale * self.second.scale * total


def compare_adapters(first: Path, second: Path) -> AdapterDifference:
    """Compare two adapters of one base, of any ranks and scales.

    Under DoRA, updates are compared without the magnitudes, which are among the other tensors.

    Raises:
        AdapterError: an adapter cannot be read or has an incomplete update, or a module is updated
            in different shapes.
    """
    one = read_contents(first)
    other = read_contents(second)
    updates = _updates(one)
    other_updates = _updates(other)
    rows: list[UpdateDifference] = []
    inner_product = 0.0
    for name in sorted(updates.keys() | other_updates.keys()):
        pair = _Pair(updates.get(name), other_updates.get(name))
        rows.append(_difference(name, pair))
        inner_product += pair.inner_product
    norms = (_root_sum([row.norms[0] for row in rows]), _root_sum([row.norms[1] for row in rows]))
    return AdapterDifference(
        folders=(str(first), str(second)),
        same_base=_same_base(one, other),
        updates=tuple(rows),
        norms=norms,
        difference=_root_sum([row.difference for row in rows]),
        cosine=_cosine(inner_product, *norms),
        other_tensors=_other_tensors(one, other),
    )


def _updates(contents: AdapterContents) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    for name, factors in contents.layers.items():
        update = update_of(name, factors, contents)
        if update is None:
            raise AdapterError(
                f"the update of {name} in {contents.folder} is incomplete or not finite, so it "
                "cannot be compared; fetch or train the adapter again"
            )
        updates[name] = update
    return updates


def _difference(name: str, pair: _Pair) -> UpdateDifference:
    first, second = pair.first, pair.second
    values = torch.zeros(1) if first is None else singular_values(first)
    other_values = torch.zeros(1) if second is None else singular_values(second)
    norms = (float(values.norm()), float(other_values.norm()))
    overlap_right = overlap_left = None
    if first is not None and second is not None:
        _check_shapes(name, first, second)
        overlap_right = _overlap(subspace_similarity(first, second, side="right"))
        overlap_left = _overlap(subspace_similarity(first, second, side="left"))
    return UpdateDifference(
        module=name,
        norms=norms,
        difference=_norm_of_difference(pair),
        ranks=(_rank(values, first), _rank(other_values, second)),
        cosine=_cosine(pair.inner_product, *norms),
        overlap_right=overlap_right,
        overlap_left=overlap_left,
    )


def _norm_of_difference(pair: _Pair) -> float:
    """Return ‖ΔW₁ − ΔW₂‖ from the singular values of the concatenated factors."""
    if pair.first is None or pair.second is None:
        single = pair.first or pair.second
        return 0.0 if single is None else float(singular_values(single).norm())
    same_factors = torch.equal(pair.first.a, pair.second.a) and torch.equal(
        pair.first.b, pair.second.b
    )
    if same_factors and pair.first.scale == pair.second.scale:
        return 0.0  # without the rounding of the decomposition
    a = torch.cat([pair.first.a.double(), pair.second.a.double()])
    scaled = pair.first.scale * pair.first.b.double()
    other_scaled = pair.second.scale * pair.second.b.double()
    b = torch.cat([scaled, -other_scaled], dim=1)
    return float(singular_values(Update(a, b, 1.0)).norm())


def _check_shapes(name: str, first: Update, second: Update) -> None:
    if first.shape != second.shape:
        raise AdapterError(
            f"{name} is updated in the shapes {first.shape} and {second.shape}; "
            "compare adapters of one base"
        )


def _overlap(similarity: Tensor) -> float | None:
    """Return φ of the complete spaces; None if an update is zero."""
    return float(similarity[-1, -1]) if similarity.numel() else None


def _rank(values: Tensor, update: Update | None) -> int:
    return 0 if update is None else rank_of_update(values, update.shape)


def _cosine(inner_product: float, norm: float, other_norm: float) -> float | None:
    if not (norm and other_norm):
        return None
    return max(-1.0, min(1.0, inner_product / (norm * other_norm)))


def _root_sum(norms: list[float]) -> float:
    squares = [norm**2 for norm in norms]
    return math.sqrt(sum(squares))


def _same_base(one: AdapterContents, other: AdapterContents) -> bool | None:
    """Compare the recorded digests, or the names if there are none of one kind."""
    digests = by_kind((one.identity or {}).get("base_digests", {}))
    other_digests = by_kind((other.identity or {}).get("base_digests", {}))
    if digests.keys() & other_digests.keys() - {UNCHANGED}:
        return shares_any(digests, other_digests)
    name = one.values.get("base_model_name_or_path")
    other_name = other.values.get("base_model_name_or_path")
    return name == other_name if name and other_name else None


def _other_tensors(one: AdapterContents, other: AdapterContents) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    tensors = _outside_of_layers(one)
    other_tensors = _outside_of_layers(other)
    for key in sorted(tensors.keys() | other_tensors.keys()):
        first, second = tensors.get(key), other_tensors.get(key)
        if first is None or second is None or first.shape != second.shape:
            found[key] = None
        else:
            found[key] = float((first.double() - second.double()).norm())
    return found


def _outside_of_layers(contents: AdapterContents) -> dict[str, Tensor]:
    """Return every tensor that is not a factor of a layer's update."""
    factors = {id(each) for pair in contents.layers.values() for each in pair.tensors}
    return {key: value for key, value in contents.tensors.items() if id(value) not in factors}
