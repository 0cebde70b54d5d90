"""A trained tensor that takes no part in the model's computation is found in one pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from lora_core import LoraConfig, TargetError, check_used, inject, unused_tensors
from lora_core.modules import adapter_parts
from lora_core.usage import refuse_unused_layers

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Bypassing(nn.Module):
    """Calls its first layer; `use` computes with the second."""

    def __init__(self, use: Callable[["Bypassing", Tensor], Tensor]) -> None:
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.bypassed = nn.Linear(8, 8)
        self.reference = self.bypassed.weight
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.called(x))


def unused(_: Bypassing, x: Tensor) -> Tensor:
    return x


def by_reference(model: Bypassing, x: Tensor) -> Tensor:
    return F.linear(x, model.reference)


def detached(model: Bypassing, x: Tensor) -> Tensor:
    return F.linear(x, model.bypassed.weight.detach())


def without_gradient(model: Bypassing, x: Tensor) -> Tensor:
    with torch.no_grad():
        side = model.bypassed(x)
    return x + side


def called(model: Bypassing, x: Tensor) -> Tensor:
    return model.bypassed(x)


def weight_read(model: Bypassing, x: Tensor) -> Tensor:
    return F.linear(x, model.bypassed.weight)


def checkpointed(model: Bypassing, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(model.bypassed, x, use_reentrant=True)
    return result


def adapted(use: Callable[[Bypassing, Tensor], Tensor], **settings: object) -> Bypassing:
    model = Bypassing(use)
    targets = ("called", "bypassed")
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, **settings), seed=1)
    return model


@pytest.mark.parametrize("use", [unused, by_reference, detached, without_gradient])
def test_layer_that_is_bypassed_is_named(use: Callable[[Bypassing, Tensor], Tensor]) -> None:
    model = adapted(use)
    names = unused_tensors(model, lambda: model(X))
    assert names == ["bypassed.lora_A.weight", "bypassed.lora_B.weight"]
    with pytest.raises(TargetError, match=r"2 trained tensors take no part .* exclude_modules"):
        check_used(model, lambda: model(X))


@pytest.mark.parametrize("use", [called, weight_read, checkpointed])
@pytest.mark.parametrize("use_dora", [False, True])
def test_layer_that_is_used_passes_before_training(
    use: Callable[[Bypassing, Tensor], Tensor], use_dora: bool
) -> None:
    """B is zero then, so the gradient of A is zero too, but it exists."""
    model = adapted(use, use_dora=use_dora)
    check_used(model, lambda: model(X).square().mean())


def test_bias_next_to_a_read_weight_is_named() -> None:
    model = adapted(weight_read, lora_bias=True)
    assert unused_tensors(model, lambda: model(X)) == ["bypassed.lora_B.bias"]


def test_fully_trained_module_and_rows_are_checked() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "e": nn.Embedding(5, 8)})
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=("a",),
        modules_to_save=("b",),
        trainable_token_indices={"e": (1,)},
    )
    inject(model, config, seed=1)
    names = unused_tensors(model, lambda: model["a"](X))
    assert names == ["b.weight", "b.bias", "e.token_adapter.trainable_tokens_delta"]


def test_gradients_of_before_are_kept() -> None:
    model = adapted(called)
    model(X).sum().backward()
    before = {path: part.lora_B.grad for path, part in adapter_parts(model)}
    copies = {path: gradient.clone() for path, gradient in before.items()}
    check_used(model, lambda: model(2 * X))
    for path, part in adapter_parts(model):
        assert part.lora_B.grad is before[path]
        assert torch.equal(part.lora_B.grad, copies[path])
    assert all(
        parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad
    )


def test_unused_pooler_is_named() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=20, intermediate_size=16, **sizes))
    inject(model, LoraConfig(r=2, lora_alpha=4), seed=1)
    tokens = torch.arange(6)[None]
    names = unused_tensors(model, lambda: model(tokens).last_hidden_state)
    assert names == ["pooler.dense.lora_A.weight", "pooler.dense.lora_B.weight"]
    check_used(model, lambda: model(tokens).pooler_output)


def test_pass_without_gradients_is_refused() -> None:
    model = adapted(called)
    with pytest.raises(TargetError, match="depends on no trained tensor"):
        check_used(model, lambda: model(X).detach())
    with pytest.raises(TargetError, match="carries no trained adapter"):
        check_used(nn.Linear(2, 2), lambda: X)


def test_gradient_is_enabled_for_the_pass() -> None:
    model = adapted(called)
    with torch.no_grad():
        check_used(model, lambda: model(X))


class Routed(nn.Module):
    """Two blocks of two experts each, of which only the first is called."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.ModuleDict({"mlp": nn.Module()}) for _ in range(2)]
        for block in blocks:
            block["mlp"].experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            block["mlp"].up = nn.Linear(8, 8)
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block["mlp"].up(block["mlp"].experts[0](x))
        return x


def names_without_gradient(model: nn.Module, output: Tensor) -> list[str]:
    output.sum().backward()
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    return [name for name, one in trained if one.grad is None]


def test_unrouted_expert_is_accepted_and_unused_layer_of_a_block_is_refused() -> None:
    model = Routed()
    inject(model, LoraConfig(r=2, lora_alpha=4), seed=1)
    names = names_without_gradient(model, model(X))
    assert len(names) == 4 and all(".experts.1." in name for name in names)
    refuse_unused_layers(model, names)
    model.zero_grad()
    names = names_without_gradient(model, model.layers[0]["mlp"].up(X))
    with pytest.raises(TargetError, match=r"1 adapted layers .*: layers\.1\.mlp\.up; the model"):
        refuse_unused_layers(model, names)


def test_layer_with_a_gradient_of_zeros_or_of_one_tensor_is_accepted() -> None:
    model = adapted(weight_read, lora_bias=True)
    names = names_without_gradient(model, 0 * model(X))
    assert names == ["bypassed.lora_bias"]
    refuse_unused_layers(model, names)


def test_rows_of_tokens_that_do_not_occur_are_accepted() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=("1",), trainable_token_indices={"0": (4,)}
    )
    inject(model, config, seed=1)
    refuse_unused_layers(model, names_without_gradient(model, model(torch.tensor([0, 1]))))
