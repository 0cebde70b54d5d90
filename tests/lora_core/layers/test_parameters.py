"""Updates of named parameters compute as in PEFT, with files that are read both ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from lora_core import (
    Bank,
    Identity,
    LoraConfig,
    RoutingError,
    TargetError,
    check_used,
    inject,
    load_adapter,
    merge,
    plan_targets,
    save_adapter,
    unmerge,
)
from lora_core.injection import updated_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 3,
}
TOKENS = torch.arange(3, 15).view(2, 6)


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_experts_per_tok=2))


def llama4() -> nn.Module:
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, intermediate_size_mlp=12))


class Holder(nn.Module):
    """Computes with a matrix and a stack of its own, and with a linear layer."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 8, 6))
        self.matrix = nn.Parameter(torch.randn(6, 8))
        self.scale = nn.Parameter(torch.randn(8))
        if transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio,oj->bj", x * self.scale, self.stack, self.matrix)


class Outer(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.inner = Holder(transposed)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.inner(x.float()[:, None].expand(-1, 8)))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    parameters: tuple[str, ...]


def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(TOKENS).logits
    return output


def outputs(model: nn.Module) -> Tensor:
    output: Tensor = model(torch.tensor([0.5, -1.0, 2.0]))
    return output


BOTH = ("experts.gate_up_proj", "experts.down_proj")
CASES = {
    "gpt-oss": Case(gpt_oss, logits, BOTH),
    "gpt-oss, one stack": Case(gpt_oss, logits, ("experts.down_proj",)),
    "gpt-oss, biases": Case(gpt_oss, logits, ("gate_up_proj", "gate_up_proj_bias")),
    "Llama 4": Case(llama4, logits, BOTH),
    "Llama 4, router": Case(llama4, logits, ("router.weight",)),
    "matrix": Case(lambda: Outer(False), outputs, ("inner.matrix",)),
    "matrix and stack": Case(lambda: Outer(False), outputs, ("matrix", "stack")),
    "transposed stack": Case(lambda: Outer(True), outputs, ("stack",)),
    "weight of a linear layer": Case(lambda: Outer(False), outputs, ("linear.weight",)),
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a model whose every parameter is drawn, since Llama 4 initializes some to zero."""
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def config(case: Case, **settings: Any) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 3, "target_modules": (), **settings}
    return LoraConfig(target_parameters=case.parameters, **options)


def train(model: nn.Module) -> None:
    """Change what is trained by random values."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_files_are_read_both_ways(case: Case, tmp_path: Path) -> None:
    model = seeded(case.build)
    inject(model, config(case), seed=0)
    base = case.call(seeded(case.build))
    assert torch.equal(case.call(model), base)
    train(model)
    save_adapter(model, tmp_path / "ours", config(case), Identity())
    reference = PeftModel.from_pretrained(seeded(case.build), tmp_path / "ours")
    torch.testing.assert_close(case.call(model), case.call(reference), rtol=1e-4, atol=1e-5)
    assert (case.call(model) - base).abs().max() > 0.01

    options = {"r": 2, "lora_alpha": 3, "target_modules": []}
    peft_config = PeftConfig(target_parameters=list(case.parameters), **options)
    trained = get_peft_model(seeded(case.build), peft_config)
    train(trained)
    trained.save_pretrained(tmp_path / "theirs")
    loaded = seeded(case.build)
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(case.call(loaded), case.call(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_merged_parameters_compute_the_same_and_every_factor_is_trained(case: Case) -> None:
    model = seeded(case.build)
    inject(model, config(case), seed=0)
    check_used(model, lambda: case.call(model))
    train(model)
    adapted = case.call(model)
    adapted.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.any() for parameter in trained)
    merged = merge(model)
    torch.testing.assert_close(case.call(model), adapted, rtol=1e-4, atol=1e-5)
    unmerge(model, merged)
    assert torch.equal(case.call(model), adapted)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_plan_counts_the_trained_weights(case: Case) -> None:
    model = seeded(case.build)
    targets = plan_targets(model, config(case))
    inject(model, config(case), seed=0)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert sum(target.trained_weights for target in targets) == trained


def test_readers_of_a_parameter_get_the_update() -> None:
    model: Any = seeded(lambda: Outer(False))
    inject(model, config(CASES["matrix"]), seed=0)
    train(model)
    part = model.inner
    expected = part.base.matrix + 1.5 * part.lora_B["matrix"] @ part.lora_A["matrix"]
    torch.testing.assert_close(part.matrix, expected)
    assert part.stack is part.base.stack
    with pytest.raises(AttributeError, match="absent"):
        _ = part.absent


REFUSED = {
    "vector": (("inner.scale",), r"inner.scale of Holder cannot be adapted: its shape is \(8,\)"),
    "absent": (("inner.absent",), "matches no parameter; stacks of experts here end in inner.st"),
}


@pytest.mark.parametrize(("parameters", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_parameter_without_a_low_rank_update_is_refused(
    parameters: tuple[str, ...], message: str
) -> None:
    model = seeded(lambda: Outer(False))
    with pytest.raises(TargetError, match=message):
        inject(model, config(Case(gpt_oss, logits, parameters)), seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameter_of_the_model_itself_is_refused() -> None:
    with pytest.raises(TargetError, match="cannot be replaced in a parent"):
        inject(Holder(False), config(CASES["matrix"]._replace(parameters=("matrix",))), seed=0)


def test_parameter_around_another_target_is_refused() -> None:
    class Around(Outer):
        def __init__(self) -> None:
            super().__init__(False)
            self.table = nn.Parameter(torch.randn(4, 4))

    model = nn.Sequential(Around())
    settings = {"target_modules": ("linear",), "target_parameters": ("0.table",)}
    with pytest.raises(TargetError, match=r"0\.linear .* is inside 0, .* name one of them"):
        inject(model, LoraConfig(r=2, lora_alpha=2, **settings), seed=0)


def test_quantized_parameter_is_refused() -> None:
    model = seeded(lambda: Outer(False))
    model.inner.stack = nn.Parameter(model.inner.stack.data.to(torch.float8_e4m3fn))
    with pytest.raises(TargetError, match="float8_e4m3fn; load the base in full precision"):
        inject(model, config(CASES["transposed stack"]), seed=0)


def test_rows_of_several_adapters_are_refused() -> None:
    bank = Bank(seeded(lambda: Outer(False)))
    bank.add("one", config(CASES["matrix"]), seed=0)
    match = "'one' updates the weights of a Holder"
    with pytest.raises(RoutingError, match=match), bank.rows(["one", None]):
        pass
    with bank.using("one"):
        assert list(updated_parameters(bank.model)) == ["inner"]
