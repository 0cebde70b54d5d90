"""Names that match what LoRA can adapt and something else are refused, with both in the message."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

from lora_core import LoraConfig, TargetError, inject
from lora_core.modules import adapter_parts


class Clamped(nn.Module):
    """A wrapper that is not a linear layer, as Gemma 4 has in its vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.clamp(-1, 1))


class Unchanged(nn.Linear):
    """A subclass that inherits the forward."""


class Scaled(nn.Linear):
    """A subclass that computes a linear layer for one value of its factor only."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        factor: float = 1.0,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        return self.factor * F.linear(input, self.weight, self.bias)


class TwoTowers(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        self.vision = nn.ModuleDict({"q_proj": other})


def config(targets: str | tuple[str, ...], **settings: object) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=2, target_modules=targets, **settings)  # type: ignore[arg-type]


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


def normalized() -> nn.Module:
    with pytest.warns(FutureWarning):
        return weight_norm(nn.Linear(8, 8))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "wrapper": Clamped,
    "convolution": lambda: nn.ConvTranspose1d(8, 8, 1),
    "norm": lambda: nn.LayerNorm(8),
    "pruned": pruned,
    "weight norm": normalized,
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("targets", [("q_proj",), r".*q_proj"], ids=["name", "regex"])
def test_partial_match_is_refused_with_both_kinds(
    build: Callable[[], nn.Module], targets: str | tuple[str, ...]
) -> None:
    model = TwoTowers(build())
    parameters = dict(model.named_parameters())
    message = r"1 modules that can be adapted \(text\.q_proj\) and 1 that cannot \(vision\.q_proj"
    with pytest.raises(TargetError, match=message):
        inject(model, config(targets), seed=0)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter.requires_grad for parameter in parameters.values())


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS.keys())
def test_excluding_the_others_adapts_the_rest(build: Callable[[], nn.Module]) -> None:
    model = TwoTowers(build())
    inject(model, config(("q_proj",), exclude_modules=("vision.q_proj",)), seed=0)
    assert [name for name, _ in adapter_parts(model)] == ["text.q_proj"]


@pytest.mark.parametrize("build", [pruned, normalized], ids=["pruned", "weight norm"])
def test_all_linear_refuses_a_layer_that_computes_its_weight(
    build: Callable[[], nn.Module],
) -> None:
    with pytest.raises(TargetError, match=r"vision\.q_proj: Linear whose weight is computed"):
        inject(TwoTowers(build()), config("all-linear"), seed=0)


def test_regex_over_a_region_accepts_containers_and_norms() -> None:
    model = TwoTowers(Clamped())
    inject(model, config(r"(text|vision)\..*"), seed=0)
    assert [name for name, _ in adapter_parts(model)] == ["text.q_proj", "vision.q_proj.linear"]


def test_regex_over_a_region_refuses_other_weights_in_it() -> None:
    with pytest.raises(TargetError, match=r"vision\.q_proj: ConvTranspose1d"):
        inject(TwoTowers(nn.ConvTranspose1d(8, 8, 1)), config(r"(text|vision)\..*"), seed=0)


def test_subclass_that_inherits_the_forward_is_adapted() -> None:
    model = TwoTowers(Unchanged(8, 8))
    inject(model, config(("q_proj",)), seed=0)
    assert [name for name, _ in adapter_parts(model)] == ["text.q_proj", "vision.q_proj"]


def test_output_of_the_very_layer_is_verified() -> None:
    inject(TwoTowers(Scaled(8, 8)), config(("q_proj",)), seed=0)
    with pytest.raises(TargetError, match=r"vision\.q_proj is a Scaled whose output is not"):
        inject(TwoTowers(Scaled(8, 8, factor=0.5)), config(("q_proj",)), seed=0)


def test_layer_whose_forward_was_replaced_by_another_function_is_refused() -> None:
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: 2 * F.linear(x, linear.weight)  # type: ignore[method-assign]
    with pytest.raises(TargetError, match=r"vision\.q_proj is a Linear whose output is not"):
        inject(TwoTowers(linear), config(("q_proj",)), seed=0)


@pytest.mark.parametrize(
    "settings",
    [{"targets": ("e",)}, {"targets": ("l",), "trainable_token_indices": {"e": (1,)}}],
    ids=["update", "rows"],
)
def test_embedding_that_rescales_its_rows_is_refused(settings: dict[str, object]) -> None:
    model = nn.ModuleDict({"e": nn.Embedding(9, 8, max_norm=1.0), "l": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match=r"e has max_norm=1\.0"):
        inject(model, config(**settings), seed=0)  # type: ignore[arg-type]
    assert not list(adapter_parts(model))
