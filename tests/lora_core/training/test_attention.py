"""A packed row computes what each example computes alone, through a whole Hugging Face model with grouped heads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM

from lora_core.training.attention import Segment, packed_attention, tree_mask

# float32 through two layers; the order of the sums inside attention differs between the kernels.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    AttentionInterface.register("packed", packed_attention)
    yield


@pytest.fixture
def packed_llama(build_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    model = build_llama()
    model.set_attn_implementation("packed")
    return model


def example(length: int, seed: int) -> Tensor:
    return torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def alone(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    return model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
def packed(model: LlamaForCausalLM, tokens: Tensor, positions: Tensor, segments: list[Segment]) -> Tensor:
    return model.model(input_ids=tokens[None], position_ids=positions[None], segments=segments, use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[5], [5, 1, 8], [1, 1, 1], [3, 12]], ids=str)
def test_a_pack_computes_each_example_alone(
    build_llama: Callable[..., LlamaForCausalLM], packed_llama: LlamaForCausalLM, lengths: list[int], kernel: str
) -> None:
    reference = build_llama()
    reference.set_attn_implementation(kernel)
    examples = [example(length, seed) for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = packed(packed_llama, torch.cat(examples), positions, [Segment(length) for length in lengths])
    for found, tokens in zip(hidden.split(lengths), examples, strict=True):
        torch.testing.assert_close(found, alone(reference, tokens), **CLOSE)


def test_branches_of_a_tree_compute_each_continuation_alone(
    build_llama: Callable[..., LlamaForCausalLM], packed_llama: LlamaForCausalLM
) -> None:
    """Two segments: a prompt of 6 with three answers, then a plain causal example."""
    prompt, answers, other = example(6, 1), [example(n, 10 + n) for n in (4, 1, 3)], example(5, 2)
    lengths = [len(answer) for answer in answers]
    tokens = torch.cat([prompt, *answers, other])
    positions = torch.cat([torch.arange(6), *(torch.arange(6, 6 + n) for n in lengths), torch.arange(5)])
    segments = [Segment(6 + sum(lengths), tree_mask(6, lengths)), Segment(5)]
    hidden = packed(packed_llama, tokens, positions, segments)
    reference = build_llama()
    shared, *branches, last = hidden.split([6, *lengths, 5])
    for found, answer in zip(branches, answers, strict=True):
        expected = alone(reference, torch.cat([prompt, answer]))
        torch.testing.assert_close(torch.cat([shared, found]), expected, **CLOSE)
    torch.testing.assert_close(last, alone(reference, other), **CLOSE)


def test_no_example_sees_another(packed_llama: LlamaForCausalLM) -> None:
    """Bit for bit: a change in one segment reaches no other."""
    lengths = [4, 6]
    positions = torch.cat([torch.arange(length) for length in lengths])
    segments = [Segment(length) for length in lengths]
    first = packed(packed_llama, torch.cat([example(4, 1), example(6, 2)]), positions, segments)
    second = packed(packed_llama, torch.cat([example(4, 3), example(6, 2)]), positions, segments)
    assert torch.equal(first[4:], second[4:])
    assert not torch.equal(first[:4], second[:4])


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention written out in float64, (1, H, T, E) each, heads repeated by hand."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=3) @ value).transpose(1, 2)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [0.25, 1.5])
def test_heads_scale_and_gradients_equal_attention_written_out(key_heads: int, scaling: float) -> None:
    query = torch.randn(1, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, key_heads, 9, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    segments = [Segment(3), Segment(6, tree_mask(2, [3, 1]))]
    mask = torch.block_diag(torch.ones(3, 3).tril(), tree_mask(2, [3, 1]).float()).bool()
    found, weights = packed_attention(nn.Identity(), query, key, value, None, segments=segments, scaling=scaling)
    expected = softmax_attention(query, key, value, mask, scaling)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, (query, key, value), upstream) for y in (found, expected))
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11)


@given(prefix=st.integers(0, 5), branches=st.lists(st.integers(0, 4), max_size=4))
@settings(derandomize=True, deadline=None)
def test_tree_mask_row_by_row(prefix: int, branches: list[int]) -> None:
    owners = [0] * prefix + [number for number, length in enumerate(branches, start=1) for _ in range(length)]
    expected = [[column <= row and owner in (0, owners[row]) for column, owner in enumerate(owners)] for row in range(len(owners))]
    mask = tree_mask(prefix, branches)
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


@pytest.mark.parametrize("lengths", [[4], [4, 6]])
def test_segments_must_cover_the_row(lengths: list[int]) -> None:
    tensors = torch.randn(3, 1, 2, 9, 8)
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        packed_attention(nn.Identity(), *tensors, None, segments=[Segment(length) for length in lengths])
