"""lora_linear is x W0ᵀ + bias + s·dropout(x)AᵀBᵀ with autograd's gradients, and saves only x."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base.quant import DenseWeight
from lora_core.layers.functional import ScaledFactors, lora_linear

IN, OUT, RANK, SCALE, SEED = 24, 40, 3, 1.7, 77
SHAPES = [(5, IN), (2, 3, IN), (2, 1, 3, IN)]


@dataclass
class LinearCase:
    """One call's tensors; A, B and x require gradients."""

    x: Tensor
    layer: nn.Linear
    a: Tensor
    b: Tensor

    def ours(self, dropout: float = 0.0) -> Tensor:
        torch.manual_seed(SEED)
        return lora_linear(
            self.x,
            DenseWeight(self.layer),
            bias=self.layer.bias,
            update=ScaledFactors(self.a, self.b, SCALE),
            dropout=dropout,
        )

    def plain(self, mask: Tensor | float = 1.0) -> Tensor:
        """Three linear layers under plain autograd."""
        base = F.linear(self.x, self.layer.weight, self.layer.bias)
        update = F.linear(F.linear(self.x * mask, self.a), self.b)
        return base + SCALE * update

    def gradients(self, y: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (self.x, self.a, self.b), upstream)


@pytest.fixture
def make_case() -> Callable[..., LinearCase]:
    def make(
        shape: tuple[int, ...], *, bias: bool = True, dtype: torch.dtype = torch.float64
    ) -> LinearCase:
        layer = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        a = torch.randn(RANK, IN, dtype=dtype, requires_grad=True)
        b = torch.randn(OUT, RANK, dtype=dtype, requires_grad=True)
        return LinearCase(x, layer, a, b)

    return make


def mask_of(shape: tuple[int, ...], dropout: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the factors that dropout applies to an input of `shape`.

    The identity as A and B over a weight of zero reveals them.
    """
    width = shape[-1]
    zero = nn.Linear(width, width, bias=False, dtype=dtype)
    nn.init.zeros_(zero.weight)
    identity = torch.eye(width, dtype=dtype)
    torch.manual_seed(SEED)
    y = lora_linear(
        torch.ones(shape, dtype=dtype),
        DenseWeight(zero),
        bias=None,
        update=ScaledFactors(identity, identity, 1.0),
        dropout=dropout,
    )
    return y.detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_value_and_gradients_equal_autograd(
    make_case: Callable[..., LinearCase], shape: tuple[int, ...], bias: bool, dropout: float
) -> None:
    case = make_case(shape, bias=bias)
    expected = case.plain(mask_of(shape, dropout) if dropout else 1.0)
    upstream = torch.randn_like(expected)
    # float64, sums of at most 40 terms: 1e-12 is two digits above the rounding.
    torch.testing.assert_close(case.ours(dropout), expected, rtol=1e-12, atol=1e-12)
    found = case.gradients(case.ours(dropout), upstream)
    for gradient, reference in zip(found, case.gradients(expected, upstream), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_equal_finite_differences(
    make_case: Callable[..., LinearCase], dropout: float
) -> None:
    case = make_case((2, 3, IN))

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return LinearCase(x, case.layer, a, b).ours(dropout)

    assert torch.autograd.gradcheck(function, (case.x, case.a, case.b))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str
)
def test_float32_and_bfloat16_are_close_to_float64(
    make_case: Callable[..., LinearCase], dtype: torch.dtype, tolerance: float
) -> None:
    """Unit roundoffs are 6e-8 and 4e-3.

    Both sums are about √IN·s·√RANK ≈ 15, so the tolerance is a few roundoffs of that.
    """
    case = make_case((7, IN), dtype=dtype)
    exact = LinearCase(
        case.x.double(), case.layer.to(torch.float64), case.a.double(), case.b.double()
    )
    reference = exact.plain()
    found = LinearCase(case.x, case.layer.to(dtype), case.a, case.b).ours()
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), reference, rtol=tolerance, atol=tolerance * reference.abs().max().item()
    )


def test_adapter_in_float32_under_bfloat16_input_gets_float32_gradients(
    make_case: Callable[..., LinearCase],
) -> None:
    case = make_case((6, IN), dtype=torch.bfloat16)
    case.a, case.b = (t.detach().float().requires_grad_() for t in (case.a, case.b))
    x, a, b = case.gradients(case.ours(), torch.ones(6, OUT, dtype=torch.bfloat16))
    assert (x.dtype, a.dtype, b.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_strided_and_empty_inputs_are_supported(make_case: Callable[..., LinearCase]) -> None:
    case = make_case((4, 5, IN))
    transposed = LinearCase(case.x.transpose(0, 1), case.layer, case.a, case.b)
    torch.testing.assert_close(
        transposed.ours(), case.ours().transpose(0, 1), rtol=1e-12, atol=1e-12
    )
    empty = LinearCase(case.x[:0], case.layer, case.a, case.b)
    assert empty.ours().shape == (0, 5, OUT)


def test_single_vector_is_treated_as_a_row(make_case: Callable[..., LinearCase]) -> None:
    case = make_case((4, IN))
    vector = LinearCase(case.x[0], case.layer, case.a, case.b)
    torch.testing.assert_close(vector.ours(), case.ours()[0], rtol=1e-12, atol=1e-12)


def test_upstream_gradient_may_be_expanded(make_case: Callable[..., LinearCase]) -> None:
    case = make_case((2, 3, IN))
    ours = case.gradients(case.ours().sum(), None)
    plain = case.gradients(case.plain().sum(), None)
    for found, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)


def test_input_that_needs_no_gradient_gets_none(make_case: Callable[..., LinearCase]) -> None:
    case = make_case((5, IN))
    case.x = case.x.detach()
    case.ours().sum().backward()
    assert case.x.grad is None
    assert case.a.grad is not None and case.b.grad is not None


def saved_for_backward(work: Callable[[], Tensor], parameters: list[Tensor]) -> dict[int, int]:
    """Return address → bytes of what `work` saves for backward, except its parameters."""
    known = {parameter.data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    assert result.requires_grad
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_q_k_v_save_only_one_shared_x(
    make_case: Callable[..., LinearCase], dtype: torch.dtype
) -> None:
    q, k, v = (make_case((2, 8, IN), dtype=dtype) for _ in "qkv")
    for case in (q, k, v):
        case.a, case.b = (t.detach().float().requires_grad_() for t in (case.a, case.b))
    k.x = v.x = q.x
    parameters = [t for case in (q, k, v) for t in (case.a, case.b)]
    saved = saved_for_backward(lambda: torch.stack([case.ours() for case in (q, k, v)]), parameters)
    assert saved == {q.x.data_ptr(): q.x.numel() * q.x.element_size()}


def test_plain_autograd_saves_more(make_case: Callable[..., LinearCase]) -> None:
    """Control of the count above: two linear layers save x·Aᵀ too."""
    case = make_case((2, 8, IN))
    saved = saved_for_backward(case.plain, [case.a, case.b, case.layer.weight])
    assert sum(saved.values()) > case.x.numel() * case.x.element_size()


def test_dropout_adds_one_byte_per_input(make_case: Callable[..., LinearCase]) -> None:
    case = make_case((2, 8, IN))
    saved = saved_for_backward(lambda: case.ours(0.5), [case.a, case.b])
    assert sum(saved.values()) == case.x.numel() * (case.x.element_size() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_its_fraction_and_preserves_the_mean(dtype: torch.dtype) -> None:
    probability = 0.01
    mask = mask_of((8192, 64), probability, dtype).float()
    dropped = (mask == 0).float().mean().item()
    # 524,288 draws: one standard deviation of the fraction is 1.4e-4.
    deviation = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs(dropped - probability) < 6 * deviation
    # The kept inputs are divided by 1 - p, rounded to the dtype.
    factor = torch.tensor([1 / (1 - probability)]).to(dtype).float()
    torch.testing.assert_close(mask[mask != 0].unique(), factor, rtol=0, atol=0)
