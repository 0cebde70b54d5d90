"""Packed attention equals explicit float64 attention under one mask of the full row.

The references share no code with the kernels: masks are built token by token, and softmax and caps
are computed explicitly.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lora_core.training.attention import (
    PackMask,
    Segment,
    current_segments,
    packed_attention,
    use_segments,
)
from lora_core.training.attention_kernels import AttentionError

HEADS, WIDTH = 4, 8
PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "causal": lambda q, k: k <= q,
    "window of 3": lambda q, k: q - 3 < k <= q,
    "chunks of 4": lambda q, k: k <= q and q // 4 == k // 4,
    "both ways in the first two": lambda q, k: k <= q or (q < 2 and k < 2),
}
TREE = [None, 0, 1, 1, 3, 4, 0]
"""Parent of each token of a tree: 0 ─ 1 ┬ 2;  1 ─ 3 ─ 4 ─ 5;  0 ─ 6."""


def ancestors(parents: Sequence[int | None]) -> Tensor:
    """Return which token is an ancestor of which, found by walking up token by token."""
    found = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for token in range(len(parents)):
        above: int | None = token
        while above is not None:
            found[token, above] = True
            above = parents[above]
    return found


SEGMENTS = [Segment(7), Segment(len(TREE), ancestors(TREE)), Segment(2)]
TOKENS = sum(segment.length for segment in SEGMENTS)


def visible(pattern: Callable[[int, int], bool]) -> Tensor:
    return torch.tensor([[pattern(q, k) for k in range(7)] for q in range(7)])


def reference_mask(pattern: Callable[[int, int], bool]) -> Tensor:
    """Return which token attends to which in the full row."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    depths = [[*range(7)], [int(row.sum()) - 1 for row in ancestors(TREE)], [0, 1]]
    related = [torch.ones(7, 7).bool(), ancestors(TREE), torch.ones(2, 2).bool()]
    start = 0
    for depth, relation in zip(depths, related, strict=True):
        for q in range(len(depth)):
            for k in range(len(depth)):
                mask[start + q, start + k] = bool(relation[q, k]) and pattern(depth[q], depth[k])
        start += len(depth)
    return mask


def reference_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (states.repeat_interleave(repeats, dim=1) for states in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    powers = torch.exp(scores) * mask
    total = powers.sum(dim=3, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks).view(1, -1, 1, 1)
    return (powers / total @ v).transpose(1, 2)


def states(key_heads: int) -> list[Tensor]:
    shapes = [
        (1, HEADS, TOKENS, WIDTH),
        (1, key_heads, TOKENS, WIDTH),
        (1, key_heads, TOKENS, WIDTH - 2),
    ]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("key_heads", [1, 2, HEADS])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=list(PATTERNS))
def test_values_and_gradients_equal_the_reference(
    pattern: Callable[[int, int], bool], key_heads: int, has_sinks: bool, softcap: float | None
) -> None:
    tensors = states(key_heads)
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True) if has_sinks else None
    mask = PackMask(SEGMENTS, visible(pattern))
    found, weights = packed_attention(
        nn.Identity(), *tensors, mask, scaling=0.4, softcap=softcap, s_aux=sinks
    )
    expected = reference_attention(
        *tensors, reference_mask(pattern), scaling=0.4, softcap=softcap, sinks=sinks
    )
    # With a cap, the softmax is in float32, as in models; everything else is float64.
    bound = 1e-11 if softcap is None else 1e-6
    tolerance = {"rtol": bound, "atol": bound}
    assert weights is None
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, **tolerance)
    inputs = tensors if sinks is None else [*tensors, sinks]
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, inputs, upstream)
    references = torch.autograd.grad(expected, inputs, upstream)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, **tolerance)


def test_examples_do_not_see_each_other() -> None:
    """A change in one segment changes no bit of another."""
    tensors = [tensor.detach() for tensor in states(2)]
    mask = PackMask(SEGMENTS, visible(PATTERNS["causal"]))
    before = packed_attention(nn.Identity(), *tensors, mask)[0]
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[:, :, :7] += 1
    after = packed_attention(nn.Identity(), *changed, mask)[0]
    assert torch.equal(before[:, 7:], after[:, 7:])
    assert not torch.equal(before[:, :7], after[:, :7])


def test_causal_segment_needs_no_mask() -> None:
    masks = PackMask(SEGMENTS, visible(PATTERNS["causal"])).masks
    assert [mask is None for mask in masks] == [True, False, True]
    assert [mask is None for mask in PackMask(SEGMENTS).masks] == [True, False, True]
    assert PackMask(SEGMENTS).masks[1] is SEGMENTS[1].mask
    windows = PackMask(SEGMENTS, visible(PATTERNS["window of 3"])).masks
    # The last segment has two tokens, which fit into the window.
    assert [mask is None for mask in windows] == [False, False, True]


def test_dropout_drops_attention_weights() -> None:
    tensors = [tensor.detach() for tensor in states(2)]
    mask = PackMask(SEGMENTS, visible(PATTERNS["causal"]))
    torch.manual_seed(0)
    kept, dropped = (
        packed_attention(nn.Identity(), *tensors, mask, dropout=p)[0] for p in (0.0, 0.5)
    )
    assert not torch.allclose(kept, dropped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "Identity passes its attention position_bias"),
        ({"output_attentions": True}, "Identity passes its attention output_attentions"),
        ({"is_causal": False}, "Identity attends in both directions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_option_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        packed_attention(
            nn.Identity(), *states(2), PackMask(SEGMENTS, visible(PATTERNS["causal"])), **options
        )


def test_options_without_effect_are_accepted() -> None:
    mask = PackMask(SEGMENTS, visible(PATTERNS["causal"]))
    tensors = states(2)
    plain = packed_attention(nn.Identity(), *tensors, mask)[0]
    options = {
        "sliding_window": None,
        "is_causal": True,
        "use_cache": False,
        "output_attentions": False,
        "cu_seq_lens_q": None,
    }
    assert torch.equal(plain, packed_attention(nn.Identity(), *tensors, mask, **options)[0])


@pytest.mark.parametrize("mask", [None, torch.ones(TOKENS, TOKENS)], ids=["none", "tensor"])
def test_mask_that_is_not_of_a_pack_is_refused(mask: Tensor | None) -> None:
    with pytest.raises(AttentionError, match="which is not the mask of a pack"):
        packed_attention(nn.Identity(), *states(2), mask)


def test_segments_must_cover_the_row() -> None:
    with pytest.raises(AttentionError, match="one row of 7 tokens"):
        packed_attention(
            nn.Identity(), *states(2), PackMask(SEGMENTS[:1], visible(PATTERNS["causal"]))
        )


def test_current_segments_are_those_of_the_innermost_block() -> None:
    with pytest.raises(AttentionError, match="builds a mask without a pack"):
        current_segments()
    with use_segments(SEGMENTS):
        assert current_segments() is SEGMENTS
        with use_segments(SEGMENTS[:1]):
            assert current_segments() == SEGMENTS[:1]
        assert current_segments() is SEGMENTS
