"""Plan which modules get an adapter, then put them in: a pure step that can refuse, and an act that cannot half-fail."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lora_core.config import ALL_LINEAR, LoraConfig
from lora_core.errors import TargetError
from lora_core.layers import LoraLinear
from lora_core.quant import BaseWeight, base_weight, keep_layout


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter."""

    name: str
    """Module path in the model, such as `model.layers.0.mlp.up_proj`."""
    in_features: int
    out_features: int
    rank: int
    scale: float
    """Factor of B·A."""
    kind: str
    """How the base weight is stored: dense or nf4."""

    @property
    def trained_weights(self) -> int:
        return self.rank * (self.in_features + self.out_features)


def plan_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """List the modules of `model` that `config` adapts, in model order; nothing is changed.

    Works on a model of the meta device, so it costs no memory.

    Raises:
        TargetError: a pattern matches no module, a match is no linear layer, or the rank exceeds a layer.
    """
    model = unwrapped(model)
    _refuse_second_injection(model)
    candidates = _adaptable(model)
    names = _matches(model, candidates, config.target_modules)
    targets = [_target(name, candidates[name], config) for name in names]
    for target in targets:
        limit = min(target.in_features, target.out_features)
        if target.rank > limit:
            raise TargetError(
                f"rank {target.rank} exceeds {target.name} of shape {target.out_features}×{target.in_features}; "
                f"use a rank of at most {limit}, or leave that module out of target_modules"
            )
    return targets


def inject(model: nn.Module, config: LoraConfig, *, seed: int) -> list[Target]:
    """Wrap every target of `config` in a LoraLinear and freeze the rest; return the plan.

    The model computes what it computed before, bit for bit, until a B is trained.

    Args:
        model: changed in place, all targets or none.
        config: the adapter.
        seed: draws every A.

    Raises:
        TargetError: see `plan_targets`; the model is unchanged.
    """
    model = unwrapped(model)
    targets = plan_targets(model, config)
    layers = {target.name: _wrapped(model.get_submodule(target.name), target.name, config, seed) for target in targets}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    keep_layout(model)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    return targets


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield each adapter with the path of the module it wraps, in model order."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, LoraLinear):
            yield plain_name(name), module


def trained_weights(model: nn.Module) -> int:
    """Count the weights that an optimiser would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the path `name`, keeping its mode of training or evaluation."""
    model = unwrapped(model)
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def plain_name(name: str) -> str:
    """Strip what the compilation of a block puts into the paths of its modules."""
    return re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name).lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model under what compilation and data parallelism put around it: a module of one child of their name."""
    while list(dict(model.named_children())) in (["_orig_mod"], ["module"]):
        model = next(model.children())
    return model


def _wrapped(module: nn.Module, name: str, config: LoraConfig, seed: int) -> LoraLinear:
    weight = base_weight(module)
    assert weight is not None, name
    layer = LoraLinear(module, weight, config)
    layer.reset(name, config, seed)
    return layer


def _adaptable(model: nn.Module) -> dict[str, BaseWeight]:
    found = ((name, base_weight(module)) for name, module in model.named_modules())
    return {name: weight for name, weight in found if weight is not None and name}  # the root has no place to be replaced in


def _matches(model: nn.Module, candidates: dict[str, BaseWeight], patterns: str | tuple[str, ...]) -> list[str]:
    if patterns == ALL_LINEAR:
        head = _output_head(model)
        names = [name for name in candidates if model.get_submodule(name) is not head]
    elif isinstance(patterns, str):
        every = [name for name, _ in model.named_modules() if re.fullmatch(patterns, name)]
        names = _only_adaptable(patterns, every, candidates)
    else:
        names = _named(model, candidates, patterns)
    if not names:
        raise TargetError(f"target_modules={patterns!r} matches no linear layer; linear layers here end in {_endings(candidates)}")
    return names


def _named(model: nn.Module, candidates: dict[str, BaseWeight], patterns: tuple[str, ...]) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        every = [name for name, _ in model.named_modules() if name == pattern or name.endswith(f".{pattern}")]
        chosen.update(_only_adaptable(pattern, every, candidates))
    return [name for name in candidates if name in chosen]


def _only_adaptable(pattern: str, names: list[str], candidates: dict[str, BaseWeight]) -> list[str]:
    """Return the linear layers among `names`; a pattern that finds none is an error of its own."""
    linear = [name for name in names if name in candidates]
    if not linear:
        what = f"matches {names[0]}, which is no linear layer" if names else "matches no module"
        raise TargetError(f"target {pattern!r} {what}; linear layers here end in {_endings(candidates)}")
    return linear


def _endings(candidates: dict[str, BaseWeight]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in candidates})) or "nothing: the model has none"


def _output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head: Hugging Face models name theirs, and a tied head must never be adapted by accident."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _target(name: str, weight: BaseWeight, config: LoraConfig) -> Target:
    out_features, in_features = weight.shape
    return Target(name, in_features, out_features, config.r, config.scale, weight.kind)


def _refuse_second_injection(model: nn.Module) -> None:
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise TargetError("the model already carries an adapter; load a fresh base, or merge the first adapter before adding another")


def matched_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """List what `config` matches in a model, whether adapted or not."""
    model = unwrapped(model)
    inside = {f"{name}.base" for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    candidates = {name.removesuffix(".base") if name in inside else name: weight for name, weight in _adaptable(model).items()}
    return _matches(model, candidates, config.target_modules)
