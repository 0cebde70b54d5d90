"""Initialization of an adapter from data, from full-precision weights, or from given factors.

    eva      A from the inputs of a few batches, B = 0: step 0 equals the base
    loftq    s · B A ≈ W − Q for each quantized weight Q: step 0 is as close to the full-precision
             model as the rank allows

Shapes: W (out, in), A (r, in), B (out, r). Everything is computed and checked before a factor is
written.

Sources: EVA (Paischer et al. 2024, arXiv 2410.07170); LoftQ (Li et al. 2023, arXiv 2310.08659).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_core.calibration.eva import Batches, eva_initialization
from lora_core.config import DATA_DRIVEN_INITS, LoraConfig
from lora_core.errors import ConfigError, TargetError
from lora_core.init.spectral import FactorPair, residual_init
from lora_core.layers.dora import row_norms
from lora_core.layers.linear import LoraLinear
from lora_core.modules import adapter_parts

Factors = Tensor | FactorPair
"""A alone (then B is zero), or A and B."""
Original = Mapping[str, Tensor] | Callable[[str], Tensor]
"""Module path → its weight before quantization, (out, in).

A callable loads one weight at a time, so that the original need not fit in memory.
"""
Layers = Mapping[str, LoraLinear]


def set_initialization(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Initialize the updates of all adapted linear layers from the given factors.

    A layer that gets A alone computes what its base computes. Under DoRA the rows keep the norms
    that they have with the given factors.

    Args:
        model: with an adapter; other kinds of updates are not changed.
        factors: module path → A (r, in), or A and B (out, r), for every adapted linear layer.

    Raises:
        TargetError: an adapted layer has no factors, factors have no layer, or a layer's
            initialization comes from its weight; the model is unchanged.
        ConfigError: a factor has another shape, or a value that is not finite; the model is
            unchanged.
    """
    layers: dict[str, LoraLinear] = {}
    for name, part in adapter_parts(model):
        if isinstance(part, LoraLinear):
            layers[name] = part
    _check_names(layers, factors)
    pairs = {}
    for name, given in factors.items():
        pairs[name] = _checked_pair(name, layers[name], given)
    for name, (a, b) in pairs.items():
        _write_factors(layers[name], a, b)


def check_init_inputs(
    config: LoraConfig,
    data: Batches | None,
    original: Original | None,
) -> None:
    """Raise if the initialization lacks its input, or an input has no effect.

    Args:
        config: names the initialization.
        data: batches, which eva needs.
        original: full-precision weights, which loftq needs.

    Raises:
        ConfigError: one of the two is missing, or has no effect.
    """
    _check_init_input(config, "data", is_given=data is not None)
    _check_init_input(config, "original", is_given=original is not None)


def initialize_from_inputs(
    model: nn.Module,
    layers: Layers,
    data: Batches | None,
    original: Original | None,
) -> None:
    """Initialize layers that are not in `model` yet from data or full-precision weights, if given.

    Args:
        model: the base, through which the batches run.
        layers: module path → the layer to initialize.
        data: batches for eva.
        original: full-precision weights for loftq.

    Raises:
        TargetError, ConfigError: see `eva_initialization` and `loftq_initialization`; the model is
            unchanged.
    """
    factors: Iterable[tuple[str, Factors]] = ()
    if data is not None:
        ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items()}
        factors = eva_initialization(model, ranks, data).items()
    elif original is not None:
        factors = loftq_initialization(layers, original)
    for name, given in factors:
        a, b = _checked_pair(name, layers[name], given)
        _write_factors(layers[name], a, b)


def loftq_initialization(layers: Layers, original: Original) -> Iterable[tuple[str, FactorPair]]:
    """Return A and B of each quantized layer, lazily; dense layers have no error to compensate.

    Args:
        layers: module path → layer.
        original: see `Original`.

    Yields:
        Module path, and its A (r, in) and B (out, r).

    Raises:
        TargetError: no layer is quantized, or one has no original.
        ConfigError: an original has another shape, is the quantized weight itself, or is not
            finite.
    """
    quantized = {name: layer for name, layer in layers.items() if layer.frozen.kind != "dense"}
    if not quantized:
        raise TargetError(
            "init_lora_weights='loftq' has no effect: no target is quantized; "
            "load the base in 4 or 8 bits, or use 'kaiming'"
        )
    return ((name, _loftq_pair(name, layer, original)) for name, layer in quantized.items())


def _check_init_input(config: LoraConfig, argument: str, *, is_given: bool) -> None:
    """Raise if an argument of `inject` is needed and missing, or given and not needed."""
    method = config.init_lora_weights
    is_required = DATA_DRIVEN_INITS.get(method) == argument
    if is_required and not is_given:
        raise ConfigError(
            f"init_lora_weights={method!r} needs {argument!r}, and none is given; pass "
            f"{argument}= to `inject`, or inject with 'kaiming' and use `set_initialization`"
        )
    if is_given and not is_required:
        raise ConfigError(
            f"{argument!r} has no effect on init_lora_weights={method!r}; leave it out, "
            f"or use {_method_that_needs(argument)!r}"
        )


def _method_that_needs(argument: str) -> str:
    """Return the initialization that needs an argument of `inject`."""
    return next(method for method, needed in DATA_DRIVEN_INITS.items() if needed == argument)


def _loftq_pair(name: str, layer: LoraLinear, original: Original) -> FactorPair:
    """Return A and B that bring one quantized layer closest to its original."""
    weight = _original_weight(name, original)
    if tuple(weight.shape) != layer.frozen.shape:
        raise ConfigError(
            f"the original of {name} is {tuple(weight.shape)} and its layer {layer.frozen.shape}; "
            "give the weight of this base"
        )
    stored = layer.frozen.dense(torch.float32)
    rank = layer.lora_A.shape[0]
    return residual_init(weight.to(stored.device), stored, rank, layer.scale)


def _original_weight(name: str, original: Original) -> Tensor:
    """Return the weight of one layer before quantization, (out, in)."""
    if not isinstance(original, Mapping):
        return original(name)
    if name not in original:
        raise TargetError(
            f"no original weight is given for {name}; give one for every quantized target"
        )
    return original[name]


def _check_names(layers: Layers, factors: Mapping[str, Factors]) -> None:
    """Check that every layer has factors and can take them, and that all factors have a layer."""
    if not layers:
        raise TargetError(
            "the model has no adapted linear layer; inject an adapter before you initialize it"
        )
    missing = sorted(layers.keys() - factors.keys())
    extra = sorted(factors.keys() - layers.keys())
    if missing:
        raise TargetError(
            f"{len(missing)} adapted layers have no factors, such as {missing[0]}; "
            "give factors for each of them"
        )
    if extra:
        raise TargetError(
            f"{len(extra)} names have no adapted linear layer, such as {extra[0]!r}; "
            "use the names that `lora_layers` yields"
        )
    for name, layer in layers.items():
        if layer.init_A is not None:
            raise TargetError(
                f"{name} is initialized from its weight, and its output subtracts the initial "
                "pair; inject with another init_lora_weights"
            )


def _checked_pair(name: str, layer: LoraLinear, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """Return A and B (None if only A is given) after a check against the layer."""
    if isinstance(factors, Tensor):
        _check_factor(f"the A given for {name}", factors, layer.lora_A)
        return factors, None
    a, b = factors
    _check_factor(f"the A given for {name}", a, layer.lora_A)
    _check_factor(f"the B given for {name}", b, layer.lora_B)
    return a, b


def _check_factor(description: str, given: Tensor, current: Tensor) -> None:
    """Check the shape and the values of a factor that replaces `current`."""
    if given.shape != current.shape:
        raise ConfigError(
            f"{description} is {tuple(given.shape)} and its layer has {tuple(current.shape)}; "
            "give that shape"
        )
    if not (given.is_floating_point() and torch.isfinite(given).all()):
        raise ConfigError(
            f"{description} is {given.dtype} with values that are not finite floats; "
            "check where it comes from"
        )


@torch.no_grad()
def _write_factors(layer: LoraLinear, a: Tensor, b: Tensor | None) -> None:
    """Set A and B (zero if None), and under DoRA the norms of the rows."""
    layer.lora_A.copy_(a)
    if b is None:
        layer.lora_B.zero_()
    else:
        layer.lora_B.copy_(b)
    if layer.magnitude is not None and layer.row_squares is not None:
        weight = layer.frozen.dense(torch.float32)
        norms = row_norms(weight, layer.row_squares, *layer.factors(), layer.scale)
        layer.magnitude.copy_(norms)
