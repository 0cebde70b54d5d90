"""Packed attention equals attention written out in float64 under one mask over the whole row, with every option.

The references share no code with the kernels: masks are built token by token, softmax and caps are written out.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lora_core.training.attention import (
    AttentionError,
    PackMask,
    Segment,
    packed_attention,
    use_segments,
    current_segments,
)

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
    """Return who is whose ancestor, walked up token by token."""
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


def mask_written_out(pattern: Callable[[int, int], bool]) -> Tensor:
    """Return who attends to whom over the whole row."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    depths = [[*range(7)], [int(row.sum()) - 1 for row in ancestors(TREE)], [0, 1]]
    related = [torch.ones(7, 7).bool(), ancestors(TREE), torch.ones(2, 2).bool()]
    begin = 0
    for depth, relation in zip(depths, related, strict=True):
        for q in range(len(depth)):
            for k in range(len(depth)):
                mask[begin + q, begin + k] = bool(relation[q, k]) and pattern(depth[q], depth[k])
        begin += len(depth)
    return mask


def written_out(  # noqa: PLR0913
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
def test_values_and_gradients_equal_attention_written_out(
    pattern: Callable[[int, int], bool], key_heads: int, has_sinks: bool, softcap: float | None
) -> None:
    tensors = states(key_heads)
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True) if has_sinks else None
    mask = PackMask(SEGMENTS, visible(pattern))
    found, weights = packed_attention(
        nn.Identity(), *tensors, mask, scaling=0.4, softcap=softcap, s_aux=sinks
    )
    expected = written_out(
        *tensors, mask_written_out(pattern), scaling=0.4, softcap=softcap, sinks=sinks
    )
    # a capped score is squashed in float32, as models do; everything else is float64 throughout
    tolerance = (
        {"rtol": 1e-6, "atol": 1e-6} if softcap is not None else {"rtol": 1e-11, "atol": 1e-11}
    )
    assert weights is None and found.is_contiguous()
    torch.testing.assert_close(found, expected, **tolerance)
    wanted = [*tensors, *([] if sinks is None else [sinks])]
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(result, wanted, upstream) for result in (found, expected)]
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, **tolerance)


def test_no_example_sees_another() -> None:
    """Bit for bit: a change in one segment reaches no other."""
    tensors = [tensor.detach() for tensor in states(2)]
    mask = PackMask(SEGMENTS, visible(PATTERNS["causal"]))
    before = packed_attention(nn.Identity(), *tensors, mask)[0]
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[:, :, :7] += 1
    after = packed_attention(nn.Identity(), *changed, mask)[0]
    assert torch.equal(before[:, 7:], after[:, 7:])
    assert not torch.equal(before[:, :7], after[:, :7])


def test_a_plainly_causal_segment_needs_no_mask() -> None:
    masks = PackMask(SEGMENTS, visible(PATTERNS["causal"])).masks
    assert [mask is None for mask in masks] == [True, False, True]
    assert [mask is None for mask in PackMask(SEGMENTS).masks] == [True, False, True]
    assert PackMask(SEGMENTS).masks[1] is SEGMENTS[1].mask
    windows = PackMask(SEGMENTS, visible(PATTERNS["window of 3"])).masks
    assert [mask is None for mask in windows] == [
        False,
        False,
        True,
    ]  # two tokens lie inside any window


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
def test_an_option_that_is_not_computed_is_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(AttentionError, match=message):
        packed_attention(
            nn.Identity(), *states(2), PackMask(SEGMENTS, visible(PATTERNS["causal"])), **options
        )


def test_options_without_an_effect_are_taken() -> None:
    mask = PackMask(SEGMENTS, visible(PATTERNS["causal"]))
    tensors = states(2)
    plain = packed_attention(nn.Identity(), *tensors, mask)[0]
    asked = {
        "sliding_window": None,
        "is_causal": True,
        "use_cache": False,
        "output_attentions": False,
        "cu_seq_lens_q": None,
    }
    assert torch.equal(plain, packed_attention(nn.Identity(), *tensors, mask, **asked)[0])


@pytest.mark.parametrize("mask", [None, torch.ones(TOKENS, TOKENS)], ids=["none", "tensor"])
def test_a_mask_that_is_not_the_packs_is_refused(mask: Tensor | None) -> None:
    with pytest.raises(AttentionError, match="which is not the mask of a pack"):
        packed_attention(nn.Identity(), *states(2), mask)


def test_segments_must_cover_the_row() -> None:
    with pytest.raises(AttentionError, match="one row of 7 tokens"):
        packed_attention(
            nn.Identity(), *states(2), PackMask(SEGMENTS[:1], visible(PATTERNS["causal"]))
        )


def test_a_mask_belongs_to_the_pack_that_is_being_read() -> None:
    with pytest.raises(AttentionError, match="no pack is being read"):
        current_segments()
    with use_segments(SEGMENTS):
        assert current_segments() is SEGMENTS
        with use_segments(SEGMENTS[:1]):
            assert current_segments() == SEGMENTS[:1]
        assert current_segments() is SEGMENTS
