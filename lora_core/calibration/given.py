"""Starts that are given to a model: found from its data or from its unrounded weights, or by whoever asks.

    eva      A from the inputs of a few batches, B = 0: step 0 is the base
    loftq    s · B A ≈ W − Q over each rounded weight Q: step 0 is as near to the unrounded model as the rank allows

Shapes: W (out, in), A (r, in), B (out, r). Everything is checked, and found, before the first factor is written.

Sources: EVA (Paischer et al. 2024, arXiv 2410.07170); LoftQ (Li et al. 2023, arXiv 2310.08659).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_core.calibration.eva import Batches, eva_starts
from lora_core.config import DATA_DRIVEN_INITS, LoraConfig
from lora_core.errors import ConfigError, TargetError
from lora_core.init.spectral import Pair, residual_start
from lora_core.layers.dora import row_norms
from lora_core.layers.linear import LoraLinear
from lora_core.modules import adapter_parts

Start = Tensor | Pair
"""A alone, beside which B starts at zero, or A and B."""
Original = Mapping[str, Tensor] | Callable[[str], Tensor]
"""Module path → its weight before it was rounded, (out, in); asked for one at a time, so it need not be in memory."""
Layers = Mapping[str, LoraLinear]


def set_starts(model: nn.Module, starts: Mapping[str, Start]) -> None:
    """Let the updates of a model's linear layers start from the given factors: all of them or none.

    What starts with A alone computes what its base computes; under DoRA the rows keep the lengths they start with.

    Args:
        model: carries an adapter; other kinds of updates keep the start they have.
        starts: module path → A (r, in), or A and B (out, r), for every linear layer that is adapted.

    Raises:
        TargetError: an adapted layer has no start here, a start has no layer, or a layer starts from its own weight.
        ConfigError: a factor has another shape, or a value that is not finite.
    """
    layers = {name: part for name, part in adapter_parts(model) if isinstance(part, LoraLinear)}
    _check_names(layers, starts)
    pairs = {name: _pair(name, layers[name], start) for name, start in starts.items()}
    for name, pair in pairs.items():
        _put(layers[name], *pair)


def check_given(config: LoraConfig, data: Batches | None, original: Original | None) -> None:
    """Refuse a start that lacks what it is found from, and what no start is found from."""
    method = config.init_lora_weights
    for argument, value in (("data", data), ("original", original)):
        wanted = DATA_DRIVEN_INITS.get(method) == argument
        if wanted and value is None:
            raise ConfigError(
                f"init_lora_weights={method!r} is found from {argument!r}, and none is given; pass {argument}= to `inject`, "
                "or inject with 'kaiming' and use `set_starts`"
            )
        if not wanted and value is not None:
            word = next(word for word, brought in DATA_DRIVEN_INITS.items() if brought == argument)
            raise ConfigError(
                f"{argument!r} has no effect on init_lora_weights={method!r}; leave it out, or use {word!r}"
            )


def start_given(
    model: nn.Module, layers: Layers, data: Batches | None, original: Original | None
) -> None:
    """Start layers that do not stand in `model` yet from its data or from its unrounded weights; without either, do nothing.

    Raises:
        TargetError, ConfigError: see `eva_starts` and `loftq_starts`; the model is unchanged.
    """
    starts: Iterable[tuple[str, Start]] = ()
    if data is not None:
        starts = eva_starts(
            model, {name: layer.lora_A.shape[0] for name, layer in layers.items()}, data
        ).items()
    elif original is not None:
        starts = loftq_starts(layers, original)
    for name, start in starts:
        _put(layers[name], *_pair(name, layers[name], start))


def loftq_starts(layers: Layers, original: Original) -> Iterable[tuple[str, Pair]]:
    """Find the start of each layer over a rounded weight, one after the other; a dense one has nothing to make up for.

    Args:
        layers: module path → layer.
        original: see `Original`.

    Raises:
        TargetError: no layer is rounded, or one has no original.
        ConfigError: an original has another shape, is the rounded weight itself, or is not finite.
    """
    rounded = {name: layer for name, layer in layers.items() if layer.frozen.kind != "dense"}
    if not rounded:
        raise TargetError(
            "init_lora_weights='loftq' has no effect: no target is quantised; load the base in 4 or 8 bits, or use 'kaiming'"
        )
    return ((name, _towards(name, layer, original)) for name, layer in rounded.items())


def _towards(name: str, layer: LoraLinear, original: Original) -> Pair:
    """Return the start of one rounded layer towards its original."""
    if isinstance(original, Mapping) and name not in original:
        raise TargetError(
            f"no original weight is given for {name}; give one for every quantised target"
        )
    weight = original[name] if isinstance(original, Mapping) else original(name)
    if tuple(weight.shape) != layer.frozen.shape:
        raise ConfigError(
            f"the original of {name} is {tuple(weight.shape)} and its layer {layer.frozen.shape}; give the base's own weight"
        )
    stored = layer.frozen.dense(torch.float32)
    return residual_start(weight.to(stored.device), stored, layer.lora_A.shape[0], layer.scale)


def _check_names(layers: Layers, starts: Mapping[str, Start]) -> None:
    if not layers:
        raise TargetError(
            "the model carries no update of a linear layer; inject an adapter before its starts are set"
        )
    missing, extra = sorted(layers.keys() - starts.keys()), sorted(starts.keys() - layers.keys())
    if missing:
        raise TargetError(
            f"{len(missing)} adapted layers have no start, such as {missing[0]}; give one for each, or none"
        )
    if extra:
        raise TargetError(
            f"{len(extra)} starts have no adapted linear layer, such as {extra[0]!r}; name layers as `lora_layers` does"
        )
    for name, layer in layers.items():
        if layer.init_A is not None:
            raise TargetError(
                f"{name} starts from its weight, which is taken off again; inject with another init_lora_weights"
            )


def _pair(name: str, layer: LoraLinear, start: Start) -> tuple[Tensor, Tensor | None]:
    """Return A and B, or None for a B of zero, held against the layer."""
    a, b = (start, None) if isinstance(start, Tensor) else start
    for letter, given, own in (("A", a, layer.lora_A), ("B", b, layer.lora_B)):
        if given is None:
            continue
        if given.shape != own.shape:
            raise ConfigError(
                f"the {letter} given for {name} is {tuple(given.shape)} and its layer holds {tuple(own.shape)}; give that shape"
            )
        if not (given.is_floating_point() and torch.isfinite(given).all()):
            raise ConfigError(
                f"the {letter} given for {name} is {given.dtype} with values that are no finite floats; look at what it came from"
            )
    return a, b


@torch.no_grad()
def _put(layer: LoraLinear, a: Tensor, b: Tensor | None) -> None:
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(torch.zeros_like(layer.lora_B) if b is None else b)
    if layer.magnitude is not None and layer.row_squares is not None:
        weight = layer.frozen.dense(torch.float32)
        layer.magnitude.copy_(row_norms(weight, layer.row_squares, *layer.factors(), layer.scale))
