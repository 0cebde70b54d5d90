"""Convolutions of one to three dimensions: PEFT computes the same, and so does a merged model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lora_core import (
    Identity,
    LoraConfig,
    MergeError,
    TargetError,
    inject,
    load_adapter,
    merge,
    plan_targets,
    save_adapter,
    unmerge,
)
from lora_core.modules import adapter_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),  # PEFT's biases in B
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SHAPES = {1: (2, 4, 9), 2: (2, 4, 7, 6), 3: (2, 4, 5, 6, 5)}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora and alpha": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "bias in B": {"lora_bias": True},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2, "padding": 1},
    "same": {"padding": "same"},
    "without bias": {"bias": False},
}


def build(dims: int, **layout: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(KINDS[dims](4, 6, 3, **layout), nn.Flatten())


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ("0",), **settings})


def sample(dims: int) -> Tensor:
    return torch.randn(SHAPES[dims], generator=torch.Generator().manual_seed(1))


def train(model: nn.Module) -> None:
    """Change what is trained by random values."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_files_are_read_both_ways(dims: int, settings: dict[str, Any], tmp_path: Path) -> None:
    """Outputs and the gradient of the input agree up to rounding."""
    x = sample(dims).requires_grad_()
    model = build(dims)
    inject(model, config(**settings), seed=0)
    assert torch.allclose(model(x), build(dims)(x), rtol=1e-5, atol=1e-5)
    train(model)
    save_adapter(model, tmp_path / "ours", config(**settings), Identity())
    reference = PeftModel.from_pretrained(build(dims), tmp_path / "ours")
    expected = reference(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    [ours] = torch.autograd.grad(model(x).square().sum(), x)
    [theirs] = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    options = {"r": 3, "lora_alpha": 6, "target_modules": ["0"], **settings}
    trained = get_peft_model(build(dims), PeftConfig(**options))
    train(trained)
    trained.save_pretrained(tmp_path / "theirs")
    loaded = build(dims)
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), trained.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_merged_kernel_computes_the_same(dims: int, layout: dict[str, Any], use_dora: bool) -> None:
    x = sample(dims)
    model = build(dims, **layout)
    inject(model, config(use_dora=use_dora), seed=0)
    train(model)
    adapted = model(x)
    kernel = model[0].weight
    merged = merge(model)
    assert type(model[0]) is KINDS[dims]
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].weight, kernel, rtol=1e-5, atol=1e-6)
    unmerge(model, merged)
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("dims", KINDS)
def test_dilated_kernel_computes_the_sum(dims: int) -> None:
    """PEFT's A has no dilation, so the convolution with W0 + s·B·A is the reference."""
    model = build(dims, dilation=2)
    x = sample(dims)
    inject(model, config(), seed=0)
    train(model)
    layer: Any = model[0]
    update = layer.scale * layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)
    dense = build(dims, dilation=2)
    dense[0].weight.data += update.view(dense[0].weight.shape)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_input_without_batch_dimension(dims: int, use_dora: bool) -> None:
    model = build(dims)[:1]
    inject(model, config(use_dora=use_dora), seed=0)
    train(model)
    x = sample(dims)
    torch.testing.assert_close(model(x[0]), model(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", KINDS)
def test_plan_counts_the_trained_weights(dims: int) -> None:
    model = build(dims)
    [target] = plan_targets(model, config())
    assert (target.layer, target.in_features) == (f"conv{dims}d", 4 * 3**dims)
    inject(model, config(), seed=0)
    part = dict(adapter_parts(model))["0"]
    trained = sum(tensor.numel() for tensor in part.adapter_tensors().values())
    assert target.trained_weights == trained


OTHER_LAYOUTS: dict[str, dict[str, Any]] = {
    "groups": {"groups": 2, "stride": 2, "padding": 1},
    "reflection": {"padding": 1, "padding_mode": "reflect"},
    "circular, same": {"padding": "same", "padding_mode": "circular", "dilation": 1},
}


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("layout", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS.keys())
@pytest.mark.parametrize("extra", [{}, {"lora_bias": True}], ids=["plain", "bias in B"])
def test_groups_and_other_paddings_compute_what_peft_computes(
    dims: int, layout: dict[str, Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    x = sample(dims).requires_grad_()
    settings = {"r": 4, "lora_alpha": 6, **extra}
    model = build(dims, **layout)
    [target] = inject(model, config(**settings), seed=0)
    assert target.trained_weights == model[0].lora_A.numel() + model[0].lora_B.numel()
    assert torch.equal(model(x), build(dims, **layout)(x))
    train(model)
    save_adapter(model, tmp_path / "ours", config(**settings), Identity())
    reference = PeftModel.from_pretrained(build(dims, **layout), tmp_path / "ours")
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    [ours] = torch.autograd.grad(model(x).square().sum(), x)
    [theirs] = torch.autograd.grad(reference(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    loaded = build(dims, **layout)
    trained = get_peft_model(build(dims, **layout), PeftConfig(target_modules=["0"], **settings))
    train(trained)
    trained.save_pretrained(tmp_path / "theirs")
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), trained.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS.keys())
def test_update_that_no_kernel_includes_is_not_merged(layout: dict[str, Any]) -> None:
    model = build(2, **layout)
    inject(model, config(r=4), seed=0)
    train(model)
    adapted = model(sample(2))
    with pytest.raises(MergeError, match="no kernel that computes its update"):
        merge(model)
    assert torch.equal(model(sample(2)), adapted)


def test_update_of_a_grouped_kernel_as_one_matrix() -> None:
    """The dense update over all channels, as an ungrouped convolution, is what the layer adds."""
    model = build(2, groups=2)
    inject(model, config(r=4), seed=0)
    train(model)
    kernel = model[0].delta().view(6, 4, 3, 3)
    added = model(sample(2)) - build(2, groups=2)(sample(2))
    expected = nn.functional.conv2d(sample(2), kernel).flatten(1)
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 3}, "rank 3 of 0, a convolution with groups=2, must be a multiple"),
        ({"r": 2, "use_dora": True}, "use_dora=True has no meaning for 0"),
        ({"r": 2, "init_lora_weights": "orthogonal"}, "'orthogonal' has no meaning for 0"),
    ],
    ids=["rank", "dora", "orthogonal"],
)
def test_setting_that_groups_cannot_have_is_refused(settings: dict[str, Any], message: str) -> None:
    model = build(2, groups=2)
    with pytest.raises(TargetError, match=message):
        inject(model, config(**settings), seed=0)
    assert type(model[0]) is nn.Conv2d


class Scaled(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Conv1d):
    pass


def test_subclass_is_adapted_if_it_computes_a_convolution() -> None:
    inject(nn.Sequential(Renamed(4, 4, 1)), config(), seed=0)
    with pytest.raises(TargetError, match=r"0, which cannot be adapted \(Scaled\)"):
        inject(nn.Sequential(Scaled(4, 4, 1)), config(), seed=0)
