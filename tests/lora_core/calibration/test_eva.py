"""EVA matches a decomposition of all inputs at once, and leaves the model unchanged."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import ConfigError, LoraConfig, TargetError, inject
from lora_core.calibration.eva import eva_initialization, input_spectra, redistribute_ranks

BLOCK = "model.layers.1"
QKV = tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")
Build = Callable[..., LlamaForCausalLM]
# float32 decompositions, each accurate to about 1e-6 of the largest singular value.
CLOSE = {"rtol": 0, "atol": 1e-5}


class TwoReaders(nn.Module):
    """Two layers that read the same tensor, or two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 3)
        self.second = nn.Linear(12, 3)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.first(x) + self.second(x if other is None else other)


def rows_of_falling_strength(rows: int, width: int, *, ratio: float = 0.7) -> Tensor:
    """Return rows whose directions differ clearly in strength."""
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    return torch.randn(rows, width) * ratio ** torch.arange(width) @ basis


def batches_of(model: nn.Module, rows: Tensor, sizes: int | list[int]) -> list[Callable]:
    return [partial(model, part) for part in rows.split(sizes)]


def language_model_batch(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    return partial(model, input_ids=tokens, use_cache=False)


def projector(rows: Tensor) -> Tensor:
    """Return the projection onto the row space: independent of the signs of the rows."""
    return rows.T @ rows


def test_directions_match_decomposition_of_all_inputs() -> None:
    """With k equal to the number of features nothing is truncated: batch sizes do not matter."""
    model = TwoReaders()
    rows = rows_of_falling_strength(60, 12)
    batches = batches_of(model, rows, [20, 3, 37])
    found = input_spectra(model, ["first"], batches, rank=12)["first"]
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(found.values, values, rtol=0, atol=1e-5 * values[0].item())
    for rank in (1, 4, 8):
        ours = projector(found.right[:rank])
        expected = projector(right[:rank])
        # An error of 1e-6 over a gap of 0.02.
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.right @ found.right.T, torch.eye(12), **CLOSE)
    torch.testing.assert_close(found.explained, values.square() / rows.square().sum(), **CLOSE)


def test_result_is_exact_if_inputs_span_at_most_rank_directions() -> None:
    model = TwoReaders()
    rows = torch.randn(40, 4) @ torch.randn(4, 12)
    found = input_spectra(model, ["first"], batches_of(model, rows, 5), rank=4)["first"]
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(found.values, values[:4], rtol=1e-5, atol=0)
    torch.testing.assert_close(projector(found.right), projector(right[:4]), **CLOSE)
    assert found.explained.sum().item() == pytest.approx(1, abs=1e-5)


def test_truncation_keeps_the_strongest_directions() -> None:
    """Rank 3 of 12 in ten batches keeps nearly as much as the full decomposition, never more."""
    model = TwoReaders()
    rows = rows_of_falling_strength(200, 12, ratio=0.5)
    found = input_spectra(model, ["first"], batches_of(model, rows, 20), rank=3)["first"]
    best = torch.linalg.svdvals(rows)[:3].square().sum() / rows.square().sum()
    kept = (rows @ found.right.T).square().sum() / rows.square().sum()
    assert 0.999 * best < kept <= best * (1 + 1e-6)
    assert found.explained.sum() <= kept * (1 + 1e-6)


def test_rows_of_a_are_orthonormal_and_strongest_in_language_model(
    build_llama: Build, tokens: Tensor
) -> None:
    model = build_llama()
    targets = dict.fromkeys(QKV, 4) | {f"{BLOCK}.mlp.down_proj": 6}
    inputs: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        inputs[name] = args[0]

    with ExitStack() as hooks:
        for name in targets:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(partial(record, name)))
        found = eva_initialization(model, targets, [language_model_batch(model, tokens)])
    assert {name: len(a) for name, a in found.items()} == targets
    for name, a in found.items():
        rows = inputs[name].flatten(0, -2)
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), **CLOSE)
        best = torch.linalg.svdvals(rows)[: len(a)].norm()
        assert (rows @ a.T).norm().item() == pytest.approx(best.item(), rel=1e-5)


def test_layers_with_same_input_share_one_decomposition(
    build_llama: Build, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_llama()
    shapes: list[torch.Size] = []
    svd = torch.linalg.svd

    def recording_svd(matrix: Tensor, full_matrices: bool = True) -> object:
        shapes.append(matrix.shape)
        return svd(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", recording_svd)
    targets = dict(zip((*QKV, f"{BLOCK}.self_attn.o_proj"), (2, 4, 3, 2), strict=True))
    found = eva_initialization(model, targets, 3 * [language_model_batch(model, tokens)])
    assert len(shapes) == 3 * 2  # batches × distinct inputs, not × targets
    most_rows = max(rows for _, rows in shapes)
    assert most_rows == 4 + tokens.numel()  # kept directions and the rows of a batch
    q, k, _ = QKV
    assert torch.equal(found[q], found[k][:2])
    assert found[q].data_ptr() != found[k].data_ptr()


def test_tensor_modified_between_two_layers_counts_as_two_inputs() -> None:
    model = TwoReaders()
    x = torch.randn(5, 12)

    def halve(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].mul_(0.5)

    model.second.register_forward_pre_hook(halve)
    found = input_spectra(model, ["first", "second"], [lambda: model(x.clone())], rank=2)
    torch.testing.assert_close(found["second"].values, 0.5 * found["first"].values)


def test_batches_may_run_in_inference_mode() -> None:
    model = TwoReaders()
    x = torch.randn(5, 12)
    batch = torch.inference_mode()(lambda: model(x.clone()))
    found = eva_initialization(model, {"first": 2, "second": 2}, [batch])
    assert not found["first"].is_inference()
    expected = torch.linalg.svd(x).Vh[:2]
    torch.testing.assert_close(projector(found["first"]), projector(expected), **CLOSE)


def initial_q(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return EVA's A for q_proj."""
    name = QKV[0]
    return eva_initialization(model, {name: 3}, [language_model_batch(model, tokens)])[name]


def test_adapted_model_gives_same_result_as_its_base(build_llama: Build, tokens: Tensor) -> None:
    adapted = build_llama()
    inject(adapted, LoraConfig(r=4, lora_alpha=8), seed=0)
    assert torch.equal(initial_q(build_llama(), tokens), initial_q(adapted, tokens))


def test_wrapper_does_not_change_result(
    build_llama: Build, tokens: Tensor, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    plain = initial_q(build_llama(), tokens)
    wrapped = initial_q(wrapper(build_llama()), tokens)
    torch.testing.assert_close(projector(plain), projector(wrapped), **CLOSE)


def test_compiled_block_does_not_change_result(build_llama: Build, tokens: Tensor) -> None:
    model = build_llama()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    plain = initial_q(build_llama(), tokens)
    compiled = initial_q(model, tokens)
    torch.testing.assert_close(projector(plain), projector(compiled), **CLOSE)


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_unchanged(
    build_llama: Build, tokens: Tensor, state_of: Callable, assert_same_state: Callable, fails: bool
) -> None:
    model = build_llama().train()
    before = state_of(model)

    def run_batch() -> None:
        model(input_ids=tokens, use_cache=False)
        if fails:
            raise KeyboardInterrupt

    try:
        eva_initialization(model, {QKV[0]: 3}, [run_batch])
    except KeyboardInterrupt:
        assert fails
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert_same_state(state_of(model), before)
    assert model.training
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({}, ConfigError, "no target"),
        ({"third": 2}, TargetError, "the model has no module 'third'"),
        ({"": 2}, TargetError, "is not a linear layer"),
        ({"first": 0}, ConfigError, "rank 0 of first, which reads 12 features"),
        ({"first": 13}, ConfigError, "rank 13 of first, which reads 12 features"),
        ({"first": 6}, ConfigError, "first received 5 rows, fewer than its rank 6"),
    ],
)
def test_invalid_targets_raise(
    targets: dict[str, int], error: type[Exception], message: str
) -> None:
    model = TwoReaders()
    with pytest.raises(error, match=message):
        eva_initialization(model, targets, [lambda: model(torch.randn(5, 12))])


def test_rank_below_1_raises() -> None:
    with pytest.raises(ConfigError, match="rank=0 must be at least 1"):
        input_spectra(TwoReaders(), ["first"], [], rank=0)


def test_missing_zero_or_nonfinite_inputs_raise() -> None:
    model = TwoReaders()
    for batches in ([], [lambda: model(torch.zeros(5, 12))]):
        with pytest.raises(TargetError, match="first received no input other than zero"):
            eva_initialization(model, {"first": 2}, batches)
    with pytest.raises(ConfigError, match="an input of first is not finite"):
        eva_initialization(model, {"first": 2}, [lambda: model(torch.full((5, 12), torch.nan))])


def test_layers_that_share_input_in_some_batches_raise() -> None:
    """Each spectrum would contain rows of the other layer; in separate calls, both are correct."""
    model = TwoReaders()
    x = torch.randn(6, 12)
    other = torch.randn(6, 12)
    batches = [lambda: model(x), lambda: model(x + 1, other)]
    message = "shares its input with another target in some batches only"
    with pytest.raises(TargetError, match=message):
        input_spectra(model, ["first", "second"], batches, rank=2)
    alone = input_spectra(model, ["second"], batches, rank=12)["second"]
    expected = torch.linalg.svdvals(torch.cat([x, other]))
    torch.testing.assert_close(alone.values, expected, rtol=0, atol=1e-5)


# --- redistribution of ranks ---


def test_ranks_go_to_strongest_directions() -> None:
    explained = {
        "a": torch.tensor([0.9, 0.05, 0.01]),
        "b": torch.tensor([0.4, 0.3, 0.2]),
        "c": torch.tensor([0.04, 0.03, 0.02]),
    }
    assert redistribute_ranks(explained, 4) == {"a": 1, "b": 3, "c": 0}
    assert redistribute_ranks(explained, 6) == {"a": 2, "b": 3, "c": 1}
    assert redistribute_ranks(explained, 9) == {"a": 3, "b": 3, "c": 3}


def test_equal_fractions_go_to_layer_named_first() -> None:
    fractions = torch.tensor([0.5, 0.25])
    assert redistribute_ranks({"b": fractions, "a": fractions}, 3) == {"b": 2, "a": 1}


@pytest.mark.parametrize("budget", [0, -1, 5])
def test_budget_outside_number_of_directions_raises(budget: int) -> None:
    fractions = torch.tensor([0.5, 0.2])
    with pytest.raises(ConfigError, match=f"budget={budget} must be from 1 to 4"):
        redistribute_ranks({"a": fractions, "b": fractions}, budget)
