"""Adapted experts equal their base at step 0, never form a dense B·A, and learn like dense ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_mixtral import (
    BOTH,
    DOWN,
    EXPERTS,
    HIDDEN,
    INNER,
    RANK,
    SCALE,
    adapt,
    each_choice,
    experts_of,
    make_layer,
    make_mixtral,
    peft_config,
)
from peft import get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Logits = Callable[[nn.Module], Tensor]
TOKENS = 6

# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, the experts of each token and their weights; expert 2 gets no token."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights = torch.rand(TOKENS, 2, generator=generator)
    index = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3], [1, 0], [3, 1]])
    return hidden, index, weights


def dense_delta(a: Tensor, b: Tensor) -> Tensor:
    """Compute ΔW (E, out, in) from PEFT's factors, in their documented order."""
    deltas = []
    for expert in range(EXPERTS):
        rows = [expert * RANK + rank for rank in range(RANK)]
        columns = [rank * EXPERTS + expert for rank in range(RANK)]
        deltas.append(SCALE * b[:, columns] @ a[rows])
    return torch.stack(deltas)


class Allocations(TorchDispatchMode):
    """Records the largest tensor that an operation creates, except views of the base's weights."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in base.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.largest = max(self.largest, storage.nbytes() // leaf.itemsize)
        return result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_choice
def test_step_zero_is_the_base_bit_for_bit(
    logits: Logits, dtype: torch.dtype, training: bool, names: tuple[str, ...]
) -> None:
    model = make_mixtral(dtype=dtype).train(training)
    before = logits(model)
    assert torch.equal(logits(adapt(model, names, noise=False)), before)


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_step_zero_differs_from_a_grouped_base_only_by_roundings(
    logits: Logits, kernel: str
) -> None:
    model = make_mixtral(kernel=kernel)
    before = logits(model)
    # The kernel computes the same products of 32 and 48 terms and adds the same three outputs in
    # another order.
    torch.testing.assert_close(logits(adapt(model, noise=False)), before, rtol=1e-5, atol=1e-5)


@each_choice
def test_forward_and_gradients_are_those_of_dense_weights(names: tuple[str, ...]) -> None:
    layer = make_layer(names).double()
    hidden, index, weights = routed()
    ours = [hidden.double().requires_grad_(), weights.double().requires_grad_()]
    theirs = [leaf.detach().clone().requires_grad_() for leaf in ours]
    factors, dense = {}, {}
    for name in names:
        a = layer.lora_A[name].detach().clone().requires_grad_()
        b = layer.lora_B[name].detach().clone().requires_grad_()
        factors[name] = (a, b)
        dense[name] = getattr(layer.base, name).detach() + dense_delta(a, b)
    expected = functional_call(layer.base, dense, (theirs[0], index, theirs[1]))
    found = layer(ours[0], index, ours[1])
    # float64 throughout: only the order of roundings differs.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found, expected, **close)
    assert (found - layer.base(ours[0], index, ours[1])).abs().max() > 0.01
    upstream = torch.randn(found.shape, dtype=torch.float64)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for leaf, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad, **close)
    for name, (a, b) in factors.items():
        torch.testing.assert_close(layer.lora_A[name].grad, a.grad, **close)
        torch.testing.assert_close(layer.lora_B[name].grad, b.grad, **close)


@each_choice
def test_merged_weights_are_the_dense_sum(names: tuple[str, ...]) -> None:
    layer = make_layer(names)
    before = copy.deepcopy(layer.base.state_dict())
    merged = layer.merged_tensors()
    assert tuple(merged) == names
    for name, total in merged.items():
        delta = dense_delta(layer.lora_A[name].double(), layer.lora_B[name].double())
        expected = before[name].double() + delta
        assert total.dtype == torch.float32
        # Two terms and one sum, each rounded to float32.
        torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    for name, weight in layer.base.state_dict().items():
        assert torch.equal(weight, before[name])


def test_bfloat16_base_is_merged_in_float32() -> None:
    layer = adapt(make_mixtral(dtype=torch.bfloat16)).get_submodule("model.layers.0.mlp.experts")
    expected = make_layer().merged_tensors()
    for name, total in layer.merged_tensors().items():
        assert torch.equal(total, expected[name])  # the two bases hold the same values


@pytest.mark.parametrize("frozen", [True, False])
@each_choice
def test_only_the_adapter_gets_gradients(
    tokens: Tensor, names: tuple[str, ...], frozen: bool
) -> None:
    model = adapt(make_mixtral(), names).train()
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for path, layer in experts_of(model).items():
        assert all(parameter.grad is None for parameter in layer.base.parameters()), path
        for parameter in layer.adapter_tensors().values():
            assert parameter.grad.abs().max() > 0, path
        sizes = [
            parameter.numel()
            for name, parameter in model.named_parameters()
            if name.startswith(f"{path}.lora_")
        ]
        assert sum(one.numel() for one in layer.adapter_tensors().values()) == sum(sizes)


def test_no_tensor_as_large_as_one_expert_is_created() -> None:
    """ΔW of one stack is at least 4 times the limit; not even one expert's ΔW is formed."""
    layer = make_layer()
    hidden, index, weights = routed()
    with Allocations(layer.base) as ours:
        layer(hidden.requires_grad_(), index, weights.requires_grad_()).sum().backward()
    assert ours.largest < INNER * HIDDEN


def test_recorder_detects_a_dense_update() -> None:
    """Control of the test above."""
    model = get_peft_model(make_mixtral(), peft_config(BOTH))
    theirs = model.base_model.model.model.layers[0].mlp.experts
    hidden, index, weights = routed()
    with Allocations(theirs.get_base_layer()) as dense:
        theirs(hidden.requires_grad_(), index, weights).sum().backward()
    assert dense.largest >= EXPERTS * 2 * INNER * HIDDEN


def test_index_after_the_last_expert_means_no_expert() -> None:
    layer = make_layer()
    hidden, index, weights = routed()
    index[1, 0] = EXPERTS
    zero_weight = weights.clone()
    zero_weight[1, 0] = 0
    other_expert = index.clone()
    other_expert[1, 0] = 2
    expected = layer(hidden, other_expert, zero_weight)
    assert torch.equal(layer(hidden, index, weights), expected)
    assert not layer(hidden[:0], index[:0], weights[:0]).numel()


def test_each_stack_is_initialized_independently() -> None:
    """The draw depends on path and stack, not on what else is adapted."""
    both = make_layer()
    alone = make_layer(DOWN)
    assert torch.equal(both.lora_A["down_proj"], alone.lora_A["down_proj"])
    other = copy.deepcopy(both)
    other.reset("model.layers.1.mlp.experts", "kaiming", seed=3)
    assert not torch.equal(both.lora_A["down_proj"], other.lora_A["down_proj"])
    assert not any(b.any() for b in other.lora_B.values())
    for name, inputs in (("gate_up_proj", HIDDEN), ("down_proj", INNER)):
        bound = inputs**-0.5
        assert 0.9 * bound < both.lora_A[name].abs().max() <= bound
    both.reset("path", "gaussian", seed=3)
    # 256 draws of standard deviation 1/R: the estimate has a relative standard error of
    # 1/√512 = 4 %.
    assert both.lora_A["gate_up_proj"].std().item() == pytest.approx(1 / RANK, rel=0.2)
