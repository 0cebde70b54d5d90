"""Differences from the factors equal those of the dense updates of PEFT."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_adapters import Edit, Tensors, Values, save_peft_adapter

from lora_core import AdapterError, Identity, LoraConfig, compare_adapters, save_adapter
from lora_core.spectrum.updates import Update, read_updates


@pytest.fixture(scope="module")
def other(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of another rank, scale and seed, and with another target."""
    folder = tmp_path_factory.mktemp("peft") / "other"
    targets = ["q_proj", "v_proj", "o_proj"]
    return save_peft_adapter(llama_folder, folder, seed=1, r=6, target_modules=targets)


def dense(update: Update | None) -> np.ndarray:
    return np.zeros(1) if update is None else update.dense().double().numpy()


def cosines_of_principal_angles(one: np.ndarray, other: np.ndarray, ranks: list[int]) -> np.ndarray:
    """Return them for the row spaces of two dense matrices, by complete decompositions."""
    first = np.linalg.svd(one)[2][: ranks[0]]
    second = np.linalg.svd(other)[2][: ranks[1]]
    return np.linalg.svd(first @ second.T)[1]


def test_every_row_equals_the_dense_reference(plain: Path, other: Path) -> None:
    difference = compare_adapters(plain, other)
    first, second = read_updates(plain), read_updates(other)
    assert {row.module for row in difference.updates} == first.keys() | second.keys()
    for row in difference.updates:
        one, two = dense(first.get(row.module)), dense(second.get(row.module))
        # The factors are float32, and so is the dense product.
        assert row.norms == pytest.approx((np.linalg.norm(one), np.linalg.norm(two)), rel=1e-5)
        assert row.difference == pytest.approx(np.linalg.norm(one - two), rel=1e-5)
        if not (one.any() and two.any()):
            assert (row.cosine, row.overlap_right, row.overlap_left) == (None, None, None)
            continue
        assert row.ranks == (4, 6)
        expected = np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two)
        assert row.cosine == pytest.approx(expected, abs=1e-6)
        right = cosines_of_principal_angles(one, two, [4, 6])
        assert row.overlap_right == pytest.approx(np.mean(right**2), abs=1e-5)
        left = cosines_of_principal_angles(one.T, two.T, [4, 6])
        assert row.overlap_left == pytest.approx(np.mean(left**2), abs=1e-5)


def test_the_total_counts_modules_of_one_adapter_alone(plain: Path, other: Path) -> None:
    difference = compare_adapters(plain, other)
    first, second = read_updates(plain), read_updates(other)
    inner = sum(np.sum(dense(first[name]) * dense(second[name])) for name in first.keys() & second)
    squares = [sum(np.sum(dense(each) ** 2) for each in one.values()) for one in (first, second)]
    assert difference.norms == pytest.approx([square**0.5 for square in squares], rel=1e-5)
    assert difference.cosine == pytest.approx(inner / np.prod(squares) ** 0.5, abs=1e-6)
    expected = (squares[0] + squares[1] - 2 * inner) ** 0.5
    assert difference.difference == pytest.approx(expected, rel=1e-5)
    assert difference.same_base is True
    assert not difference.is_zero


def test_an_adapter_equals_itself_and_another_basis_of_it(
    plain: Path, edited: Callable[[Edit], Path]
) -> None:
    same = compare_adapters(plain, plain)
    assert same.is_zero
    assert same.cosine == pytest.approx(1, abs=1e-12)
    basis = torch.linalg.qr(torch.randn(4, 4)).Q

    def rotate(tensors: Tensors, values: Values) -> None:
        for key, tensor in tensors.items():
            tensors[key] = basis.T @ tensor if "lora_A" in key else tensor @ basis

    rotated = compare_adapters(plain, edited(rotate))
    # float32 rounding of the rotated factors
    assert rotated.difference < 1e-6 * rotated.norms[0]
    assert all(row.overlap_right == pytest.approx(1) for row in rotated.updates)


def test_other_tensors_are_compared(plain: Path, dora: Path) -> None:
    """The same factors, and magnitudes in one of the two."""
    found = compare_adapters(plain, dora)
    assert len(found.other_tensors) == 6
    assert set(found.other_tensors.values()) == {None}
    assert set(compare_adapters(dora, dora).other_tensors.values()) == {0.0}


def test_sidecars_decide_whether_the_base_is_the_same(
    adapted: torch.nn.Module, small_config: LoraConfig, plain: Path, tmp_path: Path
) -> None:
    save_adapter(adapted, tmp_path / "one", small_config, Identity("one"))
    save_adapter(adapted, tmp_path / "two", small_config, Identity("two"))
    assert compare_adapters(tmp_path / "one", tmp_path / "two").same_base is True
    assert compare_adapters(tmp_path / "one", plain).same_base is False


def test_updates_of_other_shapes_are_refused(plain: Path, edited: Callable[[Edit], Path]) -> None:
    def narrow(tensors: Tensors, values: Values) -> None:
        for key in tensors:
            if key.endswith("q_proj.lora_A.weight"):
                tensors[key] = tensors[key][:, :60].contiguous()

    with pytest.raises(AdapterError, match=r"in the shapes \(64, 64\) and \(64, 60\)"):
        compare_adapters(plain, edited(narrow))
