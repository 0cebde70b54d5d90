"""A plan finds the modules that match, in model order, or raises; injection is all or nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import LoraConfig, LoraLinear, TargetError, inject, lora_layers, plan_targets

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
IN_BLOCK = [*(f"self_attn.{name}" for name in PROJECTIONS), *(f"mlp.{name}" for name in MLP)]
EVERY = [
    *(f"model.layers.0.{path}" for path in IN_BLOCK),
    *(f"model.layers.1.{path}" for path in IN_BLOCK),
]
Build = Callable[..., LlamaForCausalLM]


def config(targets: str | tuple[str, ...] = "all-linear", r: int = 4) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=8, target_modules=targets)


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, _ in lora_layers(model)]


def ending_in(*endings: str) -> list[str]:
    return [name for name in EVERY if name.endswith(endings)]


def names(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    return [target.name for target in plan_targets(model, config(targets))]


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_excludes_output_head(build_llama: Build, tied: bool) -> None:
    assert names(build_llama(tied=tied), "all-linear") == EVERY


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), ending_in("q_proj")),
        (("down_proj", "q_proj"), ending_in("q_proj", "down_proj")),
        (("model.layers.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
        (("0.mlp.up_proj",), ["model.layers.0.mlp.up_proj"]),
        (r".*layers\.1\.(self_attn\.[qv]|mlp\.up)_proj", [EVERY[7], EVERY[9], EVERY[12]]),
        (("lm_head",), ["lm_head"]),
    ],
    ids=str,
)
def test_patterns_select_matching_modules(
    build_llama: Build, targets: str | tuple[str, ...], expected: list[str]
) -> None:
    assert names(build_llama(), targets) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "quue_proj"), "'quue_proj' matches no module.*q_proj"),
        (("proj",), "'proj' matches no module"),
        (("_proj",), "'_proj' matches no module"),
        (
            ("input_layernorm",),
            "'input_layernorm' matches model.layers.0.input_layernorm, which cannot be adapted",
        ),
        (("mlp",), r"'mlp' matches model.layers.0.mlp, which cannot be adapted"),
        (r".*\.layers\.7\..*", "matches no module"),
        ("q_proj", "'q_proj' matches no module"),
    ],
    ids=str,
)
def test_pattern_without_match_raises(
    build_llama: Build, refuses: Callable[..., None], targets: str | tuple[str, ...], message: str
) -> None:
    model = build_llama()
    refuses(model, lambda: inject(model, config(targets), seed=0), TargetError, message)


def test_model_without_linear_layers_raises() -> None:
    with pytest.raises(TargetError, match="the model has none"):
        plan_targets(nn.Sequential(nn.Embedding(4, 4)), config())


def test_bare_layer_cannot_be_adapted(refuses: Callable[..., None]) -> None:
    layer = nn.Linear(8, 8)
    refuses(layer, lambda: inject(layer, config(), seed=0), TargetError, "model")


def test_rank_is_at_most_smaller_side(build_llama: Build, refuses: Callable[..., None]) -> None:
    model = build_llama()
    message = "rank 33 exceeds model.layers.0.self_attn.k_proj of shape 32×64.* at most 32"
    refuses(model, lambda: inject(model, config(r=33), seed=0), TargetError, message)
    assert len(inject(model, config(r=32), seed=0)) == len(EVERY)


def test_error_for_later_target_leaves_first_targets_unchanged(
    refuses: Callable[..., None],
) -> None:
    """The first layer could be adapted, the second cannot: neither is changed."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    refuses(
        model,
        lambda: inject(model, config(r=4), seed=0),
        TargetError,
        "rank 4 exceeds 1 .*at most 3",
    )


@pytest.mark.parametrize("targets", ["all-linear", ("o_proj",)], ids=str)
def test_second_injection_raises(
    adapted: LlamaForCausalLM, refuses: Callable[..., None], targets: str | tuple[str, ...]
) -> None:
    refuses(
        adapted,
        lambda: inject(adapted, config(targets), seed=0),
        TargetError,
        "already carries an adapter",
    )


def test_plan_on_meta_device_equals_plan_of_real_model(build_llama: Build) -> None:
    real = build_llama()
    with torch.device("meta"):
        meta = LlamaForCausalLM(real.config)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert plan_targets(meta, config()) == plan_targets(real, config())


def test_planning_changes_nothing(
    build_llama: Build,
    state_of: Callable[..., dict[str, Tensor]],
    assert_same_state: Callable[..., None],
) -> None:
    model = build_llama()
    before = state_of(model)
    modules = list(model.modules())
    plan_targets(model, config())
    assert_same_state(state_of(model), before)
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_targets_carry_shape_rank_and_scale(build_llama: Build) -> None:
    target = plan_targets(build_llama(), config(("1.mlp.down_proj",), r=8))[0]
    assert (target.in_features, target.out_features) == (128, 64)
    assert (target.rank, target.scale) == (8, 1.0)
    assert target.kind == "dense"
    assert target.trained_weights == 8 * (128 + 64)


def test_injection_wraps_targets_and_freezes_rest(
    build_llama: Build, state_of: Callable[..., dict[str, Tensor]]
) -> None:
    model = build_llama()
    before = state_of(model)
    plan = plan_targets(model, config())
    assert inject(model, config(), seed=0) == plan
    assert adapted_names(model) == EVERY
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{letter}" for name in EVERY for letter in "AB"}
    after = state_of(model)
    for name, value in before.items():
        new_name = name if name in after else name.replace("_proj.", "_proj.base.")
        assert torch.equal(value, after[new_name])


@pytest.mark.parametrize("training", [True, False])
def test_injection_keeps_training_mode(build_llama: Build, training: bool) -> None:
    model = build_llama().train(training)
    inject(model, config(), seed=0)
    assert all(module.training is training for module in model.modules())


def test_wrappers_do_not_change_names(
    adapted: LlamaForCausalLM, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    assert adapted_names(wrapper(adapted)) == adapted_names(adapted)


def test_module_named_module_keeps_its_name() -> None:
    """Only the prefix of a wrapper is stripped, never a part of the model's path."""
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"module": nn.Linear(8, 8)})})
    inject(model, config(("encoder.module",)), seed=0)
    assert adapted_names(model) == ["encoder.module"]
    assert isinstance(model.get_submodule("encoder.module"), LoraLinear)
