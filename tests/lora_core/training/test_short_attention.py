"""Attention over short examples in 16 bits equals PyTorch's in float32 up to their rounding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.training import attention_kernels
from lora_core.training.attention_kernels import AttentionOptions, kernel_for
from lora_core.training.short_attention import MAX_TOKENS, MIN_TOKENS, is_short, short_causal

HEADS, KEYS, WIDTH, VALUES = 6, 2, 16, 24
ROUNDOFF = 2**-9
"""Of bfloat16."""


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k in float32, as rotary positions make them, and v in bfloat16."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(1, HEADS, length, WIDTH, generator=generator)
    k = torch.randn(1, KEYS, length, WIDTH, generator=generator)
    v = torch.randn(1, KEYS, length, VALUES, generator=generator).to(torch.bfloat16)
    return q, k, v


def expected(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, scale=scale, enable_gqa=True
    )


def results(attend: Callable[..., Tensor], *tensors: Tensor, scale: float | None) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = attend(*leaves, scale)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(output.shape, generator=generator)
    return [output, *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


@pytest.mark.parametrize("length", [2, 33, MAX_TOKENS])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_equals_float32_up_to_rounding(length: int, scale: float | None, autocast: bool) -> None:
    tensors = inputs(length)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = results(short_causal, *tensors, scale=scale)
    exact = results(expected, *tensors, scale=scale)
    assert [tensor.dtype for tensor in found[1:]] == [tensor.dtype for tensor in tensors]
    for one, other in zip(found, exact, strict=True):
        assert (one.float() - other.float()).norm() < 4 * ROUNDOFF * other.float().norm()


def test_a_token_does_not_see_its_future() -> None:
    q, k, v = inputs(20)
    before = short_causal(q, k, v, None)
    k[:, :, 12:] += 1
    v[:, :, 12:] += 1
    after = short_causal(q, k, v, None)
    assert torch.equal(before[:, :, :12], after[:, :, :12])
    assert not torch.equal(before[:, :, 12:], after[:, :, 12:])


def test_transposed_inputs_are_read_as_they_are() -> None:
    """Models split heads by a transpose, so that q, k and v are not contiguous."""
    q, k, v = inputs(9)

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    assert torch.equal(
        short_causal(transposed(q), transposed(k), transposed(v), None),
        short_causal(q, k, v, None),
    )


@pytest.mark.parametrize(
    ("length", "dtype", "short"),
    [
        (MAX_TOKENS, torch.bfloat16, True),
        (MIN_TOKENS, torch.bfloat16, True),
        (MAX_TOKENS + 1, torch.bfloat16, False),
        (MIN_TOKENS - 1, torch.bfloat16, False),
        (MAX_TOKENS, torch.float32, False),
        (MAX_TOKENS, torch.float16, False),
    ],
)
def test_what_is_short(length: int, dtype: torch.dtype, short: bool) -> None:
    q, _, v = inputs(length)
    assert is_short(q, v.to(dtype)) is short


@pytest.mark.parametrize("options", [AttentionOptions(), AttentionOptions(dropout=0.5)])
@pytest.mark.parametrize("masked", [False, True])
def test_only_plain_causal_attention_uses_it(
    monkeypatch: pytest.MonkeyPatch, options: AttentionOptions, masked: bool
) -> None:
    uses = []

    def recorded(*arguments: Tensor) -> Tensor:
        uses.append(arguments)
        return short_causal(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_kernels, "short_causal", recorded)
    q, k, v = inputs(MIN_TOKENS)
    mask = torch.ones(MIN_TOKENS, MIN_TOKENS, dtype=torch.bool).tril() if masked else None
    output = kernel_for(options)(q, k, v, mask, options)
    assert output.dtype is torch.bfloat16
    assert bool(uses) == (not masked and options.dropout == 0)


def test_longer_examples_attend_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast too, which would choose PyTorch's slow kernel in bfloat16."""
    dtypes = []
    attend = F.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        dtypes.append((q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")))
        return attend(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    q, k, v = inputs(MAX_TOKENS + 1)
    options = AttentionOptions()
    with torch.autocast("cpu", torch.bfloat16):
        output = kernel_for(options)(q.to(torch.bfloat16), k, v, None, options)
    assert output.dtype is torch.bfloat16
    assert dtypes == [(torch.float32, torch.float32, torch.float32, False)]
