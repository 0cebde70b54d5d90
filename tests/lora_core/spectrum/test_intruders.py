"""Intruder dimensions equal those of a dense decomposition with NumPy; planted ones are found."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.errors import AdapterError, ConfigError
from lora_core.spectrum.intruders import Intruders, intruder_dimensions, intruders_of_merged
from lora_core.spectrum.leading import EXACT_SIDE, leading_svd
from lora_core.spectrum.updates import Update

Make = Callable[..., Update]
SHAPES = [(40, 40), (24, 60), (60, 24)]


def weight_of(shape: tuple[int, int], seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def reference(weight: Tensor, update: Update, leading: int, threshold: float) -> tuple[int, int]:
    """Count by the definition: all vectors of both matrices by NumPy, every pair of them."""
    base = weight.double().numpy()
    merged = base + update.scale * (update.b.double() @ update.a.double()).numpy()
    left, _, right = np.linalg.svd(base, full_matrices=False)
    merged_left, _, merged_right = np.linalg.svd(merged, full_matrices=False)
    counts = []
    for vectors, references in ((merged_left.T, left.T), (merged_right, right)):
        found = 0
        for vector in vectors[:leading]:
            found += all(abs(np.dot(vector, other)) < threshold for other in references)
        counts.append(found)
    return counts[0], counts[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 4.0])
def test_counts_equal_the_dense_reference(
    random_update: Make, shape: tuple[int, int], scale: float
) -> None:
    weight = weight_of(shape)
    for rank in (1, 4):
        update = random_update(*shape, rank, scale=scale, seed=rank)
        for leading, threshold in ((10, 0.5), (3, 0.9), (24, 0.3)):
            found = intruder_dimensions(weight, update, leading=leading, threshold=threshold)
            expected = reference(weight, update, leading, threshold)
            assert (found.left, found.right) == expected
            assert found.is_exact


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_zero_update_has_no_intruder(shape: tuple[int, int]) -> None:
    update = Update(torch.randn(2, shape[1]), torch.zeros(shape[0], 2), 1.0)
    assert intruder_dimensions(weight_of(shape), update) == Intruders(0, 0, 10, True)


def test_a_stronger_known_direction_is_no_intruder_and_a_new_one_is() -> None:
    """An update along u_3 v_3ᵀ makes that direction the strongest; one across all is new."""
    weight = weight_of((30, 40))
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    known = Update(
        torch.from_numpy(right[3:4]), torch.from_numpy(9 * values[0] * left[:, 3:4]), 1.0
    )
    assert intruder_dimensions(weight, known, leading=1) == Intruders(0, 0, 1, True)
    # The sum of all directions has the cosine 1/√30 with each.
    new = Update(
        torch.from_numpy(right.sum(0, keepdims=True) / 30**0.5),
        torch.from_numpy(9 * values[0] * left.sum(1, keepdims=True) / 30**0.5),
        1.0,
    )
    assert intruder_dimensions(weight, new, leading=1) == Intruders(1, 1, 1, True)


def test_directions_of_zero_singular_values_do_not_count() -> None:
    """W reads and writes in a 3-dimensional space; any direction outside of it is new."""
    weight = torch.zeros(8, 8)
    weight[:3, :3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    axis = torch.eye(8)[5:6]
    found = intruder_dimensions(weight, Update(axis, 9 * axis.T, 1.0), leading=8)
    assert found == Intruders(1, 1, 4, True)
    assert intruder_dimensions(torch.zeros(8, 8), Update(axis, axis.T, 1.0)).left == 1


def test_a_large_weight_is_compared_with_its_strongest_directions() -> None:
    """A weight with known singular vectors above the exact size, and one direction planted."""
    side, directions = EXACT_SIDE + 2, 30
    generator = torch.Generator().manual_seed(5)
    left = torch.linalg.qr(torch.randn(side, directions + 1, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(side, directions + 1, generator=generator)).Q
    values = torch.linspace(20, 5, directions)
    weight = (left[:, :directions] * values) @ right[:, :directions].T
    update = Update(right[:, directions:].T, 30 * left[:, directions:], 1.0)
    found = intruders_of_merged(weight, weight + update.dense())
    assert found == Intruders(1, 1, 10, False)
    # Vectors agree up to float32 rounding of the product, about 1e-5 of gaps of 0.5.
    svd = leading_svd(weight, 5)
    assert torch.allclose(svd.values.float(), values[:5], rtol=1e-4)
    cosines = (svd.left.float() * left[:, :5]).sum(0).abs()
    assert torch.allclose(cosines, torch.ones(5), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"leading": 0}, "leading=0 must be"), ({"threshold": 1.5}, "threshold=1.5 must be")],
    ids=str,
)
def test_settings_out_of_range_are_refused(
    random_update: Make, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        intruder_dimensions(weight_of((6, 8)), random_update(6, 8, 2), **options)  # type: ignore[arg-type]


def test_another_weight_is_refused(random_update: Make) -> None:
    with pytest.raises(AdapterError, match=r"the update is \(6, 8\) and the weight \(8, 6\)"):
        intruder_dimensions(weight_of((8, 6)), random_update(6, 8, 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_leading_decomposition_equals_numpys(shape: tuple[int, int]) -> None:
    weight = weight_of(shape).double()
    svd = leading_svd(weight, 7)
    expected = np.linalg.svd(weight.numpy(), full_matrices=False)
    assert svd.values.numpy() == pytest.approx(expected.S[:7], rel=1e-10)
    best = (expected.U[:, :7] * expected.S[:7]) @ expected.Vh[:7]
    found = (svd.left * svd.values) @ svd.right
    # The Gram matrix squares the condition: errors of about 1e-8.
    assert found.numpy() == pytest.approx(best, abs=1e-7)
