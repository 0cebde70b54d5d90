"""Initialization of A from data: the strongest directions of a layer's inputs (EVA).

    X = U Σ Vᵀ        A = the first r rows of Vᵀ, B = 0

X (N, in) contains the inputs of a layer for all tokens of a few batches, one per row. It is never
in memory: `input_spectrum.py` decomposes it batch by batch. Unlike in PEFT, the rows are not
centered: a mean that all tokens share is a direction that the layer reads.

The explained fractions of different layers can be compared, to give a larger rank to the layers
whose inputs have more strong directions.

Source: EVA (Paischer et al. 2024, arXiv 2410.07170).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.base.quant import base_weight, disable_cpu_repacking
from lora_core.calibration.input_spectrum import InputRecorder, InputSpectrum
from lora_core.errors import ConfigError, TargetError
from lora_core.layers.linear import LoraLinear
from lora_core.modules import module_at, plain_modules

Batches = Iterable[Callable[[], object]]
"""Each call runs one batch through the model."""


def eva_initialization(
    model: nn.Module,
    targets: Mapping[str, int],
    batches: Batches,
) -> dict[str, Tensor]:
    """Return an A (rank, in) with orthonormal rows for each target; the matching B is zero.

    Args:
        model: not changed; it stays in training or evaluation mode.
        targets: module path → rank.
        batches: see `input_spectra`.

    Raises:
        TargetError, ConfigError: see `input_spectra`.
    """
    if not targets:
        raise ConfigError("no target to initialize; name at least one module and its rank")
    for name, module in _modules_at(model, targets).items():
        width = _input_width(name, module)
        _check_rank(name, targets[name], width)
    largest = max(targets.values())
    spectra = input_spectra(model, targets, batches, rank=largest)
    factors = {}
    for name, rank in targets.items():
        right = spectra[name].right
        if rank > len(right):
            raise ConfigError(
                f"{name} received {len(right)} rows, fewer than its rank {rank}; run more tokens"
            )
        factors[name] = right[:rank].clone()
    return factors


def input_spectra(
    model: nn.Module,
    names: Collection[str],
    batches: Batches,
    *,
    rank: int,
) -> dict[str, InputSpectrum]:
    """Return the `rank` strongest directions of each module's inputs, or fewer if there are fewer.

    Every row counts, so use batches without padding. Processes that need the same result must run
    the same batches.

    Args:
        model: run without gradients; its weights, mode and hooks are unchanged afterwards.
        names: paths of linear modules, adapted or not.
        batches: callables, each of which runs the model on one batch.
        rank: at least 1; a value above the rank of the adapter makes the directions more accurate
            and lets ranks be redistributed.

    Raises:
        TargetError: a name is not a linear module, receives nothing, or shares its input with
            another module in some batches only.
        ConfigError: the rank is below 1, or an input is not finite.
    """
    if rank < 1:
        raise ConfigError(
            f"rank={rank!r} must be at least 1; use the largest rank of the adapter or more"
        )
    modules = _modules_at(model, names)
    widths = {name: _input_width(name, module) for name, module in modules.items()}
    disable_cpu_repacking(model)  # running a 4-bit base must not change its storage
    recorder = InputRecorder(rank, widths)
    # A compiled block reads its hooks only at compilation.
    with ExitStack() as hooks, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, module in modules.items():
            record = partial(_record_input, recorder, name)
            hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
        for run_batch in batches:
            run_batch()
    return recorder.spectra()


def redistribute_ranks(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return ranks that sum to `budget`: a layer's number of directions in the `budget` strongest.

    Exclude a layer of rank 0 from the targets. To keep the scales, alpha must change with the rank.

    Args:
        explained: module path → explained fraction of each direction, descending, (k,), as in
            `InputSpectrum.explained`; k limits the rank of that layer, so compute ρ times the mean
            rank, for example twice.
        budget: total rank, for example that of a uniform distribution.

    Raises:
        ConfigError: the budget is below 1 or above the number of directions.
    """
    directions: list[tuple[float, str]] = []
    for name, fractions in explained.items():
        directions += [(fraction, name) for fraction in fractions.tolist()]
    if not 1 <= budget <= len(directions):
        raise ConfigError(
            f"budget={budget!r} must be from 1 to {len(directions)}, the number of directions; "
            "compute more of them, or lower the budget"
        )
    # A stable sort: of equal fractions, the layer that is named first gets the rank.
    directions.sort(key=lambda direction: -direction[0])
    ranks = Counter(name for _, name in directions[:budget])
    return {name: ranks[name] for name in explained}


def _record_input(
    recorder: InputRecorder,
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Record the first input of a module; a forward pre-hook after its first two arguments."""
    first_input = (*args, *kwargs.values())[0]
    recorder.receive(name, first_input)


def _modules_at(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """Return the module at each path, adapted or not."""
    known = plain_modules(model)
    for name in names:
        if name not in known:
            raise TargetError(
                f"the model has no module {name!r}; give paths as `plan_targets` names them"
            )
    return {name: module_at(model, name) for name in names}


def _input_width(name: str, module: nn.Module) -> int:
    """Return the number of features that a linear module reads, adapted or not."""
    weight = module.frozen if isinstance(module, LoraLinear) else base_weight(module)
    if weight is None:
        raise TargetError(
            f"{name} is not a linear layer ({type(module).__name__}); "
            "only linear layers can be initialized from data"
        )
    return weight.shape[1]


def _check_rank(name: str, rank: int, in_features: int) -> None:
    if not 1 <= rank <= in_features:
        raise ConfigError(
            f"rank {rank} of {name}, which reads {in_features} features, must be from 1 to "
            f"{in_features}; choose another"
        )
