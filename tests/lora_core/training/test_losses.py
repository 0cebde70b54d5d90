"""The chunked head equals PyTorch's cross-entropy in value and gradients, for any chunk size."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.training.losses import (
    MIN_ROWS_IN_GRADIENT_DTYPE,
    Chunks,
    LogitTransform,
    linear_cross_entropy,
    token_log_likelihoods,
)

ROWS, WIDTH, VOCABULARY = 7, 16, 53
CHUNKS = [1, 3, ROWS, 100]
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def inputs() -> Inputs:
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    return hidden, weight, targets


def reference_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")


def gradients(loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs[:2])


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_value_and_gradients_equal_cross_entropy(inputs: Inputs, chunk_rows: int) -> None:
    loss = linear_cross_entropy(*inputs, chunks=Chunks(chunk_rows))
    expected = reference_loss(*inputs)
    assert loss.dtype == torch.float32
    # Logits of about 4 and sums over 53 tokens, in float32.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for found, reference in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divisor", [1, 7.5])
def test_upstream_gradient_scales_both_gradients(inputs: Inputs, divisor: float) -> None:
    found = gradients(linear_cross_entropy(*inputs, chunks=Chunks(3)) / divisor, inputs)
    expected = gradients(reference_loss(*inputs) / divisor, inputs)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_gradient_in_bfloat16_changes_no_loss(softcap: float | None) -> None:
    rows = MIN_ROWS_IN_GRADIENT_DTYPE
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(0, VOCABULARY, (rows,))
    transform = LogitTransform(2.0, softcap)
    losses, found = [], []
    for dtype in (None, torch.bfloat16):
        loss = linear_cross_entropy(
            hidden, weight, targets, transform=transform, chunks=Chunks(50, dtype)
        )
        losses.append(loss)
        found.append(torch.autograd.grad(loss, hidden)[0])
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(found[0], found[1])
    # Probabilities and weights are rounded to 8 bits.
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()


def test_a_trained_head_and_few_positions_keep_the_dtype_of_the_logits(inputs: Inputs) -> None:
    many = torch.randn(MIN_ROWS_IN_GRADIENT_DTYPE, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (len(many),))
    for hidden, labels in ((inputs[0], inputs[2]), (many, targets)):
        both = (hidden, inputs[1], labels)
        plain = gradients(linear_cross_entropy(*both), both)
        in_16_bits = linear_cross_entropy(*both, chunks=Chunks(gradient_dtype=torch.bfloat16))
        for one, other in zip(gradients(in_16_bits, both), plain, strict=True):
            assert torch.equal(one, other)


def test_bfloat16_is_close_to_float64(inputs: Inputs) -> None:
    hidden, weight = (t.detach().bfloat16().requires_grad_() for t in inputs[:2])
    loss = linear_cross_entropy(hidden, weight, inputs[2], chunks=Chunks(3))
    expected = reference_loss(hidden, weight, inputs[2])
    # Each logit, of up to about 16, is rounded to 8 bits: at most 0.03 per row.
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=0.03 * ROWS)
    found = torch.autograd.grad(loss, (hidden, weight))
    references = torch.autograd.grad(expected, (hidden, weight))
    for gradient, reference in zip(found, references, strict=True):
        assert gradient.dtype == torch.bfloat16
        tolerance = 0.02 * reference.abs().max().item()
        torch.testing.assert_close(gradient.float(), reference.float(), rtol=0.02, atol=tolerance)


def test_extreme_logits_stay_finite(inputs: Inputs) -> None:
    hidden, weight, targets = inputs
    large = (hidden.detach() * 1000).requires_grad_()
    loss = linear_cross_entropy(large, weight, targets)
    expected = reference_loss(large, weight, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (large, weight)))


@pytest.mark.parametrize(
    "trained", [(True, False), (False, True), (False, False)], ids=["hidden", "weight", "neither"]
)
def test_only_trained_tensors_get_a_gradient(inputs: Inputs, trained: tuple[bool, bool]) -> None:
    for tensor, is_trained in zip(inputs[:2], trained, strict=True):
        tensor.requires_grad_(is_trained)
    loss = linear_cross_entropy(*inputs)
    assert loss.requires_grad is any(trained)
    if any(trained):
        loss.backward()
        with_gradient = [tensor for tensor in inputs[:2] if tensor.requires_grad]
        references = torch.autograd.grad(reference_loss(*inputs), with_gradient)
        for tensor, expected in zip(with_gradient, references, strict=True):
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-5)
    assert [tensor.grad is not None for tensor in inputs[:2]] == list(trained)


def test_second_backward_gives_the_same_gradient(inputs: Inputs) -> None:
    loss = linear_cross_entropy(*inputs) / 4
    first = [g.clone() for g in torch.autograd.grad(loss, inputs[:2], retain_graph=True)]
    for gradient, before in zip(torch.autograd.grad(loss, inputs[:2]), first, strict=True):
        assert torch.equal(gradient, before)


def test_empty_input_has_zero_loss_and_zero_gradients(inputs: Inputs) -> None:
    hidden, weight, targets = inputs
    empty = hidden.detach()[:0].requires_grad_()
    loss = linear_cross_entropy(empty, weight, targets[:0])
    loss.backward()
    assert loss.item() == 0
    assert empty.grad is not None
    assert empty.grad.shape == (0, WIDTH)
    assert weight.grad is not None
    assert torch.count_nonzero(weight.grad) == 0


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_likelihoods_and_greedy_flags_equal_log_softmax(inputs: Inputs, chunk_rows: int) -> None:
    hidden, weight, targets = inputs
    logits = (hidden.double() @ weight.double().T).detach()
    targets[::2] = logits.argmax(dim=1)[::2]  # so that both flags occur
    likelihoods, greedy = token_log_likelihoods(hidden, weight, targets, chunk_rows=chunk_rows)
    expected = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(likelihoods.double(), expected, rtol=1e-5, atol=1e-5)
    assert greedy.tolist() == (logits.argmax(dim=1) == targets).tolist()
    assert 0 < greedy.sum() < ROWS
    assert not likelihoods.requires_grad


def test_likelihoods_sum_to_the_loss(inputs: Inputs) -> None:
    likelihoods, _ = token_log_likelihoods(*inputs, chunk_rows=2)
    torch.testing.assert_close(-likelihoods.sum(), linear_cross_entropy(*inputs), rtol=1e-6, atol=0)


def test_tied_logits_all_count_as_greedy() -> None:
    """Accuracy then does not depend on the order of the vocabulary."""
    hidden = torch.ones(2, 1)
    weight = torch.tensor([[1.0], [2.0], [2.0]])
    _, greedy = token_log_likelihoods(hidden, weight, torch.tensor([1, 2]))
    assert greedy.tolist() == [True, True]


def test_empty_input_has_no_likelihoods(inputs: Inputs) -> None:
    likelihoods, greedy = token_log_likelihoods(inputs[0][:0], inputs[1], inputs[2][:0])
    assert (likelihoods.shape, likelihoods.dtype) == ((0,), torch.float32)
    assert (greedy.shape, greedy.dtype) == ((0,), torch.bool)


TRANSFORMS = {
    "scale": LogitTransform(scale=0.25),
    "softcap": LogitTransform(softcap=3.0),
    "both": LogitTransform(scale=2.0, softcap=1.5),
}


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_scale_softcap_and_bias_equal_explicit_logits(
    inputs: Inputs, transform: LogitTransform, has_bias: bool
) -> None:
    hidden, weight, targets = inputs
    bias = torch.randn(VOCABULARY, requires_grad=True) if has_bias else None
    product = hidden.double() @ weight.double().T
    if bias is not None:
        product = product + bias.double()
    logits = transform.scale * product
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    options = {"bias": bias, "transform": transform}
    loss = linear_cross_entropy(hidden, weight, targets, chunks=Chunks(3), **options)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    trained = [hidden, weight] if bias is None else [hidden, weight, bias]
    found = torch.autograd.grad(loss, trained)
    references = torch.autograd.grad(expected, trained)
    for gradient, reference in zip(found, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    likelihoods, greedy = token_log_likelihoods(hidden, weight, targets, chunk_rows=3, **options)
    torch.testing.assert_close(-likelihoods.double().sum(), expected.detach(), rtol=1e-5, atol=0)
    assert greedy.tolist() == (logits.argmax(dim=1) == targets).tolist()
