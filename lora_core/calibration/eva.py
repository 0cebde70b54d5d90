"""Initialization of A from data: the strongest directions of a layer's inputs (EVA).

    X = U Σ Vᵀ        A = the first r rows of Vᵀ, B = 0

X (N, in) contains the inputs of a layer for all tokens of a few batches, one per row. It is never
in memory: each batch is appended to the k directions kept so far, diag(σ) · Vᵀ, and decomposed
again, so a layer needs at most k + (rows of the batch) rows. The result is exact while the inputs
span at most k directions; after that, the strongest directions are approximate. Unlike in PEFT, the
rows are not centered: a mean that all tokens share is a direction that the layer reads.

q, k and v read the same tensor and share one decomposition. The explained fractions of different
layers can be compared, to give a larger rank to the layers whose inputs have more strong
directions.

Sources: EVA (Paischer et al. 2024, arXiv 2410.07170); incremental SVD (Ross et al. 2008, IJCV 77).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lora_core.base.quant import base_weight, disable_cpu_repacking
from lora_core.errors import ConfigError, TargetError
from lora_core.layers.linear import LoraLinear
from lora_core.modules import module_at, plain_modules

Batches = Iterable[Callable[[], object]]
"""Each call runs one batch through the model."""


@dataclass(frozen=True, eq=False)
class InputSpectrum:
    """The strongest directions of a layer's inputs."""

    right: Tensor
    """(k, in), orthonormal rows, strongest first, float32"""
    values: Tensor
    """(k,), singular values of the inputs, descending"""
    squared_norm: float
    """Σ‖x‖² over all rows, including the directions that were dropped."""

    @property
    def explained(self) -> Tensor:
        """Fraction of the inputs' squared norm in each direction, (k,); the sum is at most 1."""
        return self.values.square() / self.squared_norm


def eva_initialization(
    model: nn.Module, targets: Mapping[str, int], batches: Batches
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
        _check_rank(name, targets[name], _input_width(name, module))
    spectra = input_spectra(model, targets, batches, rank=max(targets.values()))
    for name, rank in targets.items():
        rows = len(spectra[name].values)
        if rank > rows:
            raise ConfigError(
                f"{name} received {rows} rows, fewer than its rank {rank}; run more tokens"
            )
    return {name: spectra[name].right[:rank].clone() for name, rank in targets.items()}


def input_spectra(
    model: nn.Module, names: Collection[str], batches: Batches, *, rank: int
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
    recorder = _InputRecorder(rank, widths)
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


@dataclass
class _Stream:
    """The incremental decomposition of inputs that one or several layers receive."""

    rank: int
    kept: tuple[Tensor, Tensor] | None = None
    squared_norm: float = 0.0
    absorbed: int = 0
    latest: tuple[ref[Tensor], int] | None = None
    """The last tensor that was absorbed, and its version."""

    def has_just_absorbed(self, x: Tensor) -> bool:
        """Return whether this same tensor, unchanged, was the last to be absorbed."""
        if self.latest is None:
            return False
        tensor, version = self.latest
        return tensor() is x and version == _version(x)

    def absorb(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.squared_norm += torch.linalg.vector_norm(rows, dtype=torch.float64).item() ** 2
        if self.kept is not None:
            values, right = self.kept
            rows = torch.cat([values[:, None] * right, rows])
        # Transposed, because a wide matrix takes three times as long.
        left, values, _ = torch.linalg.svd(rows.T, full_matrices=False)
        # Cloned, because a slice would keep the complete tensor in memory.
        self.kept = (values[: self.rank].clone(), left.T[: self.rank].clone())
        self.absorbed += 1
        self.latest = (ref(x), _version(x))

    def spectrum(self) -> InputSpectrum:
        assert self.kept is not None
        values, right = self.kept
        return InputSpectrum(right, values, self.squared_norm)


@dataclass
class _InputRecorder:
    """Passes the inputs of each target to its stream."""

    rank: int
    widths: Mapping[str, int]
    streams: dict[str, _Stream] = field(default_factory=dict)
    """Target → its stream; targets whose first input was the same tensor share one."""
    received: Counter[str] = field(default_factory=Counter)

    def receive(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point() or x.shape[-1] != self.widths[name]:
            raise TargetError(
                f"{name} received {tuple(x.shape)} of {x.dtype}, not rows of {self.widths[name]}; "
                "only linear layers can be initialized from data"
            )
        if not torch.isfinite(x).all():
            raise ConfigError(f"an input of {name} is not finite; check the batch and the model")
        if name not in self.streams:
            self.streams[name] = self._stream_for(x)
        self.received[name] += 1
        if not self.streams[name].has_just_absorbed(x):
            self.streams[name].absorb(x)

    def spectra(self) -> dict[str, InputSpectrum]:
        for name in self.widths:
            if self.received[name] == 0 or self.streams[name].squared_norm == 0:
                raise TargetError(
                    f"{name} received no input other than zero; run batches that reach it, "
                    "or exclude it from the targets"
                )
            if self.received[name] < self.streams[name].absorbed:
                raise TargetError(
                    f"{name} shares its input with another target in some batches only; "
                    "initialize the two in separate calls"
                )
        return {name: self.streams[name].spectrum() for name in self.widths}

    def _stream_for(self, x: Tensor) -> _Stream:
        """Return the stream that has just absorbed `x` for another target, or a new one."""
        for stream in self.streams.values():
            if stream.has_just_absorbed(x):
                return stream
        return _Stream(self.rank)


def _record_input(
    recorder: _InputRecorder,
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    first_input = (*args, *kwargs.values())[0]
    recorder.receive(name, first_input)


def _version(x: Tensor) -> int:
    """Return a counter of in-place writes to a tensor; tensors of inference mode have none."""
    return 0 if x.is_inference() else x._version


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
