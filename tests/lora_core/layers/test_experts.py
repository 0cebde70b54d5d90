"""Adapted experts equal their base at step 0, never form a dense B·A and agree with PEFT."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_core import TargetError
from lora_core.injection import replace_module
from lora_core.layers.expert_layout import STACKS, adapter_shapes, supports
from lora_core.layers.experts import LoraExperts, expert_targets

VOCABULARY, HIDDEN, INNER, EXPERTS, RANK, SCALE = 101, 32, 48, 4, 2, 1.5
TOKENS = 6
PREFIX = "base_model.model."
BOTH, GATE_UP, DOWN = STACKS, STACKS[:1], STACKS[1:]
each_choice = pytest.mark.parametrize(
    "names", [BOTH, GATE_UP, DOWN], ids=["both", "gate_up", "down"]
)
# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
Logits = Callable[[nn.Module], Tensor]


def make_mixtral(
    *, dtype: torch.dtype = torch.float32, chosen: int = 3, kernel: str = "eager"
) -> MixtralForCausalLM:
    """Return a Mixtral of two layers.

    With three experts per token, the order in which their outputs are added matters.
    """
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=chosen,
        initializer_range=0.1,
        experts_implementation=kernel,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).to(torch.bfloat16).to(dtype).eval()


def adapt(model: nn.Module, names: tuple[str, ...] = BOTH, *, noise: bool = True) -> nn.Module:
    """Adapt the stacks `names` of every layer, with noise in B or with B zero."""
    for path, stacks in expert_targets(model, names).items():
        layer = LoraExperts(model.get_submodule(path), dict.fromkeys(stacks, (RANK, SCALE)))
        layer.reset(path, "kaiming", seed=3)
        replace_module(model, path, layer)
        if noise:
            fill_with_noise(layer)
    return model


@torch.no_grad()
def fill_with_noise(layer: LoraExperts) -> None:
    generator = torch.Generator().manual_seed(11)
    for b in layer.lora_B.values():
        b.copy_(0.3 * torch.randn(b.shape, generator=generator))


def experts_of(model: nn.Module) -> dict[str, LoraExperts]:
    return {
        path: module for path, module in model.named_modules() if isinstance(module, LoraExperts)
    }


def tensors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's tensors under PEFT's keys."""
    tensors = {}
    for path, layer in experts_of(model).items():
        for key, tensor in layer.adapter_tensors().items():
            tensors[f"{PREFIX}{path}.{key}"] = tensor
    return tensors


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def make_layer(names: tuple[str, ...] = BOTH) -> LoraExperts:
    return adapt(make_mixtral(), names).get_submodule("model.layers.0.mlp.experts")


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
    merged = layer.merged()
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
    expected = make_layer().merged()
    for name, total in layer.merged().items():
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
        assert layer.trained_weights == sum(sizes)


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


def peft_config(names: tuple[str, ...]) -> PeftLoraConfig:
    """Return PEFT's config of the adapter, with noise in A and B."""
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=SCALE * RANK,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in names],
        init_lora_weights=False,
    )


@each_choice
def test_peft_loads_our_adapter_with_the_same_logits(
    logits: Logits, tmp_path: Path, names: tuple[str, ...]
) -> None:
    model = adapt(make_mixtral(), names)
    tensors = {key: tensor.detach() for key, tensor in tensors_of(model).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config(names).save_pretrained(tmp_path)
    # Warnings, such as that of a missing key, are errors here.
    theirs = PeftModel.from_pretrained(make_mixtral(), tmp_path).eval()
    # PEFT adds B·A to W and multiplies once, in float32.
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(make_mixtral())).abs().max() > 0.1
    merged = theirs.merge_and_unload()
    for path, layer in experts_of(model).items():
        for name, total in layer.merged().items():
            reference = merged.get_submodule(path).get_parameter(name)
            torch.testing.assert_close(reference, total, rtol=1e-6, atol=1e-6)


@each_choice
def test_peft_adapter_loads_with_the_same_logits(
    logits: Logits, tmp_path: Path, names: tuple[str, ...]
) -> None:
    theirs = get_peft_model(make_mixtral(), peft_config(names)).eval()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    model = adapt(make_mixtral(), names, noise=False)
    expected = tensors_of(model)
    assert shapes_of(tensors) == shapes_of(expected)
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(make_mixtral())).abs().max() > 0.1


@each_choice
def test_shapes_need_no_weights(names: tuple[str, ...]) -> None:
    with torch.device("meta"):
        base = make_mixtral()
    experts = base.get_submodule("model.layers.0.mlp.experts")
    found = adapter_shapes(experts, dict.fromkeys(reversed(names), RANK))
    assert list(found.items()) == list(shapes_of(make_layer(names).adapter_tensors()).items())


def test_keys_are_pefts() -> None:
    deeper = ["base_layer.lora_A.weight", "base_layer.lora_B.weight"]
    plain = ["lora_A.weight", "lora_B.weight"]
    assert list(make_layer(BOTH).adapter_tensors()) == deeper + plain
    assert list(make_layer(GATE_UP).adapter_tensors()) == plain
    assert list(make_layer(DOWN).adapter_tensors()) == plain


def test_patterns_match_as_peft_config() -> None:
    model = make_mixtral()
    first, second = (f"model.layers.{layer}.mlp.experts" for layer in range(2))
    assert expert_targets(model, ("down_proj", "gate_up_proj")) == {first: BOTH, second: BOTH}
    assert expert_targets(model, (f"{second}.down_proj",)) == {second: DOWN}
    assert expert_targets(model, ("layers.0.mlp.experts.gate_up_proj", "experts.down_proj")) == {
        first: BOTH,
        second: DOWN,
    }
    adapt(model)
    assert expert_targets(model, ("gate_up_proj",)) == {first: GATE_UP, second: GATE_UP}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("proj", r"'proj' matches no parameter; .* experts.down_proj, experts.gate_up_proj"),
        ("lora_A.down_proj", "matches no parameter"),
        ("experts", "matches no parameter"),
        (
            "q_proj.weight",
            r"q_proj.weight of Linear cannot be adapted: it holds weight \(32, 32\); "
            "experts need gate_up_proj",
        ),
    ],
)
@pytest.mark.parametrize("adapted", [True, False])
def test_patterns_without_experts_are_refused(pattern: str, message: str, adapted: bool) -> None:
    model = adapt(make_mixtral()) if adapted else make_mixtral()
    with pytest.raises(TargetError, match=message):
        expert_targets(model, ("down_proj", pattern))


def test_model_without_experts_is_refused(build_llama: Callable[..., nn.Module]) -> None:
    with pytest.raises(TargetError, match="the model has none"):
        expert_targets(build_llama(), ("experts.down_proj",))


def test_experts_at_the_root_are_refused() -> None:
    with pytest.raises(TargetError, match="cannot be replaced in a parent"):
        expert_targets(make_mixtral().model.layers[0].mlp.experts, ("down_proj",))


def test_experts_with_biases_are_refused() -> None:
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=2,
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    with pytest.raises(
        TargetError,
        match=r"gate_up_proj of GptOssExperts cannot be adapted: "
        r"it holds .*gate_up_proj_bias \(2, 64\)",
    ):
        expert_targets(model, ("experts.gate_up_proj",))


@pytest.mark.parametrize(
    "flag", ["is_transposed", "has_bias", "has_post_expert_norm", "_is_expert_parallel"]
)
def test_experts_with_an_unsupported_flag_are_refused(flag: str) -> None:
    experts = make_mixtral().model.layers[0].mlp.experts
    setattr(experts, flag, True)
    refuse(experts, f"MixtralExperts cannot be adapted: its {flag} is True")


def test_experts_of_unsupported_shapes_are_refused() -> None:
    experts = make_mixtral().model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.transpose(1, 2))
    refuse(experts, r"its gate_up_proj is \(4, 96, 32\) and its down_proj \(4, 48, 32\)")
    experts.down_proj = nn.Parameter(
        torch.zeros(EXPERTS, HIDDEN, INNER).to(torch.float8_e4m3fn), requires_grad=False
    )
    refuse(experts, "its down_proj is stored in torch.float8_e4m3fn")


def test_module_without_the_experts_interface_is_refused() -> None:
    experts = nn.ParameterDict(
        {"gate_up_proj": torch.zeros(2, 8, 4), "down_proj": torch.zeros(2, 4, 4)}
    )
    refuse(experts, "it has no _apply_gate")
    refuse(nn.Identity(), "it holds no parameter directly")


def refuse(module: nn.Module, message: str) -> None:
    assert not supports(module)
    with pytest.raises(TargetError, match=message):
        LoraExperts(module, {"down_proj": (RANK, SCALE)})


@pytest.mark.parametrize("sizes", [{}, {"up_proj": (RANK, SCALE)}], ids=str)
def test_missing_stacks_are_refused(sizes: dict[str, tuple[int, float]]) -> None:
    with pytest.raises(TargetError, match="name one or both of gate_up_proj, down_proj"):
        LoraExperts(make_mixtral().model.layers[0].mlp.experts, sizes)
