"""Models that read a layer's weight instead of calling the layer get the adapted weight."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel

from lora_core import LoraConfig, inject, merge
from lora_core.modules import adapter_parts

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Reads(nn.Module):
    """Reads the weight of every kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.table = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.linear.weight, self.linear.bias) @ self.table.weight.T
        return F.conv2d(y[:, None], self.conv.weight, self.conv.bias)


def encoder() -> nn.Module:
    """Return layers whose fast path passes their weights to one kernel."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def wavlm() -> nn.Module:
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,),
        conv_stride=(4,),
        conv_kernel=(4,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return WavLMModel(config)


def mamba() -> nn.Module:
    config = MambaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=4
    )
    return MambaForCausalLM(config)


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    targets: str | tuple[str, ...]


def audio(model: nn.Module) -> Tensor:
    output: Tensor = model(X.flatten()[None]).last_hidden_state
    return output


def tokens(model: nn.Module) -> Tensor:
    output: Tensor = model(torch.arange(12).view(2, 6)).logits
    return output


CASES = {
    "every kind": Case(Reads, lambda model: model(X), ("linear", "table", "conv")),
    "encoder": Case(encoder, lambda model: model(X), "all-linear"),
    "WavLM": Case(wavlm, audio, ("q_proj", "k_proj", "v_proj", "out_proj")),
    "Mamba": Case(mamba, tokens, ("in_proj", "x_proj", "dt_proj", "out_proj")),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_direct_reader_computes_with_the_adapter_and_trains_it(case: Case, use_dora: bool) -> None:
    """The merged model, whose weights are plain, is the reference."""
    torch.manual_seed(0)
    model = case.build().eval()
    with torch.no_grad():
        before = case.call(model)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=case.targets, use_dora=use_dora)
    inject(model, config, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(case.call(model), before, rtol=1e-4, atol=1e-4)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    case.call(model).square().sum().backward()
    unused = [name for name, value in trained.items() if value.grad is None or not value.grad.any()]
    assert unused == []
    with torch.no_grad():
        adapted = case.call(model)
        merge(model)
        torch.testing.assert_close(case.call(model), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - before).abs().max() > 0.01


def test_effective_weight_has_the_gradient_of_the_sum() -> None:
    """Autograd over W0 + s·B·A, written out, is the reference."""
    model = nn.Sequential(nn.Linear(4, 6))
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=("0",), lora_bias=True), seed=0)
    layer = dict(adapter_parts(model))["0"]
    layer.lora_B.data.normal_()
    probe = torch.randn(6, 4)
    (layer.weight * probe).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, 2 * layer.lora_B.T @ probe)
    torch.testing.assert_close(layer.lora_B.grad, 2 * probe @ layer.lora_A.T)
    layer.lora_bias.data.normal_()
    torch.testing.assert_close(layer.bias, layer.base.bias + 2 * layer.lora_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_effective_weight_has_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 6, dtype=dtype))
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=("0",)), seed=0)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, model[0].base.weight)
