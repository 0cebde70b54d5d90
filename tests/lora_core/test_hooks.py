"""Hooks belong to a module's path: they run once per call, with the adapter and without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn

from lora_core import Bank, Identity, LoraConfig, LoraError, inject, merge, save_adapter, unmerge
from lora_core.modules import adapter_parts

CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=("0",))
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


def train(model: nn.Module) -> None:
    torch.manual_seed(2)
    for _, part in adapter_parts(model):
        for parameter in part.adapter_tensors().values():  # type: ignore[operator]
            parameter.data += 0.3 * torch.randn(parameter.shape)


def test_hook_sees_the_input_and_output_of_the_adapted_layer_once() -> None:
    model = build()
    seen: list[tuple[Tensor, Tensor]] = []
    model[0].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    inject(model, CONFIG, seed=0)
    train(model)
    output = model[0](X)
    assert len(seen) == 1
    assert seen[0][0] is X
    assert torch.equal(seen[0][1], output)


def test_pre_hook_edits_the_input_of_base_and_update() -> None:
    model = build()
    model[0].register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    before = model(X)
    inject(model, CONFIG, seed=0)
    assert torch.equal(model(X), before)
    train(model)
    adapted = model(X)
    merge(model)
    torch.testing.assert_close(model(X), adapted, rtol=1e-5, atol=1e-5)


def test_hook_with_keyword_arguments_gets_them() -> None:
    model = build()
    names: list[set[str]] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        names.append(set(options))

    model[0].register_forward_hook(record, with_kwargs=True)
    inject(model, CONFIG, seed=0)
    model[0](input=X)
    assert names == [{"input"}]


def test_full_backward_hook_gets_the_gradients_of_the_layer() -> None:
    model = build()
    seen: list[tuple[Tensor, Tensor]] = []
    model[0].register_full_backward_hook(lambda _, into, out: seen.append((into[0], out[0])))
    inject(model, CONFIG, seed=0)
    x = X.clone().requires_grad_()
    model[0](x).sum().backward()
    [(into, out)] = seen
    assert torch.equal(into, x.grad)
    assert torch.equal(out, torch.ones(3, 8))


def test_handle_removes_the_hook_before_and_after_a_merge() -> None:
    model = build()
    calls: list[int] = []
    first = model[0].register_forward_hook(lambda *_: calls.append(1))
    inject(model, CONFIG, seed=0)
    second = model[0].register_forward_hook(lambda *_: calls.append(2))
    model(X)
    first.remove()
    model(X)
    merged = merge(model)
    model(X)
    unmerge(model, merged)
    second.remove()
    model(X)
    assert calls == [1, 2, 2, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("e",)},
        {"target_modules": ("l",), "trainable_token_indices": {"e": (1, 3)}},
        {"target_modules": ("l",), "modules_to_save": ("e",)},
        {"target_modules": ("l",), "modules_to_save": ("n",)},
        {"target_modules": ("l",), "bias": "all"},
        {"target_modules": ("c",)},
    ],
    ids=["embedding", "rows", "full embedding", "full norm", "bias", "convolution"],
)
def test_every_kind_of_part_runs_each_hook_once(settings: dict[str, Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(9, 8)
            self.n = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
            self.l = nn.Linear(8, 8)
            self.c = nn.Conv2d(1, 2, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.c(self.l(self.n(self.e(ids)))[None, None])

    model = Model()
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    ids = torch.tensor([1, 2, 3])
    model(ids)
    before = calls.copy()
    calls.clear()
    inject(model, LoraConfig(r=1, lora_alpha=1, **settings), seed=0)
    model(ids)
    assert calls == before


def test_bank_runs_each_hook_once_per_batch_of_mixed_rows() -> None:
    model = build()
    bank = Bank(model)
    for name in ("a", "b"):
        bank.add(name, CONFIG, seed=0)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    with bank.rows(["a", "b", None]):
        model(X)
    with bank.using("a"):
        model(X)
    model(X)
    assert calls == [1, 1, 1]


def put_on_cpu(model: nn.Module, _: Path) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def put_on_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, str(folder / "offload"), execution_device=torch.device("cpu"))


each_offload = pytest.mark.parametrize("offload", [put_on_cpu, put_on_disk])
Offload = Callable[[nn.Module, Path], None]


@each_offload
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}], ids=["plain", "bias in B"])
@torch.no_grad()
def test_offloaded_base_computes_the_same(
    offload: Offload, is_first: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("0",), **settings)
    reference = build()
    inject(reference, config, seed=0)
    train(reference)
    model = build()
    if is_first:
        offload(model, tmp_path)
    inject(model, config, seed=0)
    train(model)
    if not is_first:
        offload(model, tmp_path)
    torch.testing.assert_close(model(X), reference(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(X), reference(X), rtol=1e-5, atol=1e-5)


@each_offload
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ("1",)},
        {"bias": "lora_only"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_reads_an_offloaded_weight_is_refused_before_anything_changes(
    offload: Offload, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = build()
    offload(model, tmp_path)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("0",), **settings)
    with pytest.raises(LoraError, match="offload"):
        inject(model, config, seed=0)
    assert not list(adapter_parts(model))


def test_offloaded_weights_have_neither_fingerprint_nor_merge(tmp_path: Path) -> None:
    model = build()
    put_on_cpu(model, tmp_path)
    inject(model, CONFIG, seed=0)
    with pytest.raises(LoraError, match="offload"):
        save_adapter(model, tmp_path / "adapter", CONFIG, Identity())
    with pytest.raises(LoraError, match="offload"):
        merge(model)
    assert not (tmp_path / "adapter").exists()


def test_base_with_a_custom_forward_keeps_it_and_gets_gradients() -> None:
    """Autograd through the base's own forward is the reference."""
    model = build()
    linear = model[0]
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return type(linear).forward(linear, x)

    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=("0",), use_dora=True), seed=0)
    train(model)
    expected = model(X)
    expected.square().sum().backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = {name: value.grad for name, value in trained.items()}
    model.zero_grad()
    model[0].base.forward = forward
    found = model(X)
    found.square().sum().backward()
    assert calls == [1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)
