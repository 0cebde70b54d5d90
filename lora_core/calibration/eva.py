"""A start of A from data: the strongest directions of a layer's inputs (EVA).

    X = U Σ Vᵀ        A = the first r rows of Vᵀ, B = 0

X (N, in) holds the inputs of a layer for all tokens of a few batches, one a row. It is never held: each batch is stacked
under the k directions kept so far, diag(σ) · Vᵀ, and decomposed anew, so k + rows of the batch are the most that a
layer needs. Nothing is lost while the inputs span no more than k directions; after that the strongest are followed
nearly. The rows are not centred, unlike those of PEFT: a mean that all tokens share is a direction the layer reads.

q, k and v read one tensor, and share one decomposition. Explained shares of the layers can be weighed against each
other to give more rank to those that offer more.

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
"""Each call pushes one batch through the model."""


@dataclass(frozen=True, eq=False)
class InputSpectrum:
    """The strongest directions of a layer's inputs."""

    right: Tensor
    """(k, in), orthonormal rows, strongest first, float32"""
    values: Tensor
    """(k,), singular values of the inputs, falling"""
    squared_norm: float
    """Σ‖x‖² over all rows, also of the directions that were not kept."""

    @property
    def explained(self) -> Tensor:
        """Share of the squared norm of the inputs that each direction holds, (k,); they sum to 1 at most."""
        return self.values.square() / self.squared_norm


def eva_starts(model: nn.Module, targets: Mapping[str, int], batches: Batches) -> dict[str, Tensor]:
    """Return for each target an A (rank, in) of orthonormal rows; its B starts at zero.

    Args:
        model: not changed, and left in its mode of training or evaluation.
        targets: module path → rank.
        batches: see `input_spectra`.

    Raises:
        TargetError, ConfigError: see `input_spectra`.
    """
    if not targets:
        raise ConfigError("no target to start from data; name at least one module and its rank")
    widths = {name: width for name, (_, width) in _readers(model, targets).items()}
    for name, rank in targets.items():
        _check_rank(name, rank, widths[name])
    spectra = input_spectra(model, targets, batches, rank=max(targets.values()))
    for name, rank in targets.items():
        if rank > len(spectra[name].values):
            raise ConfigError(
                f"{name} received {len(spectra[name].values)} rows, fewer than its rank {rank}; push more tokens"
            )
    return {name: spectra[name].right[:rank].clone() for name, rank in targets.items()}


def input_spectra(
    model: nn.Module, names: Collection[str], batches: Batches, *, rank: int
) -> dict[str, InputSpectrum]:
    """Return the strongest `rank` directions of each module's inputs, or as many as the inputs have.

    Every row counts, so push batches without padding. Processes that are to start alike must push the same batches.

    Args:
        model: run without gradients; its weights, mode and hooks are afterwards what they were.
        names: paths of linear modules, adapted or not.
        batches: callables, each of which runs the model on one batch.
        rank: at least 1; above the rank wanted, the directions kept are truer and ranks can be redistributed.

    Raises:
        TargetError: a name is no linear module, receives nothing, or shares its input with another only at times.
        ConfigError: the rank is below 1, or an input is not finite.
    """
    if rank < 1:
        raise ConfigError(
            f"rank={rank!r} must be at least 1; follow as many directions as the largest rank wanted"
        )
    readers = _readers(model, names)
    disable_cpu_repacking(model)  # running a 4-bit base must not store it anew
    listener = _Listener(rank, {name: width for name, (_, width) in readers.items()})
    # a compiled block looks at hooks only when it is compiled
    with ExitStack() as hooks, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, (module, _) in readers.items():
            hooks.enter_context(
                module.register_forward_pre_hook(partial(_hear, listener, name), with_kwargs=True)
            )
        for push in batches:
            push()
    return listener.spectra()


def redistributed(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return ranks that sum to `budget`, one for each direction that is among the `budget` strongest of all layers.

    A layer of rank 0 is better left out of the targets. For scales to stay, alpha changes with the rank.

    Args:
        explained: module path → share of each direction, falling, (k,), as `InputSpectrum.explained`; k bounds the
            rank of that layer, so compute ρ times the mean rank, such as twice.
        budget: total rank, such as that of an even distribution.

    Raises:
        ConfigError: the budget is below 1 or above the number of directions.
    """
    offers = [(share, name) for name, shares in explained.items() for share in shares.tolist()]
    if not 1 <= budget <= len(offers):
        raise ConfigError(
            f"budget={budget!r} must lie in 1 to {len(offers)}, the directions there are; compute more of them, or ask for less"
        )
    strongest = sorted(offers, key=lambda offer: -offer[0])[
        :budget
    ]  # stable: equal shares go to the layer named first
    ranks = Counter(name for _, name in strongest)
    return {name: ranks[name] for name in explained}


@dataclass
class _Stream:
    """The running decomposition of inputs that one or several layers receive."""

    rank: int
    kept: tuple[Tensor, Tensor] | None = None
    squared_norm: float = 0.0
    absorbed: int = 0
    latest: tuple[ref[Tensor], int] | None = None

    def holds(self, x: Tensor) -> bool:
        """Whether this very tensor, unchanged, was the last to be absorbed."""
        return self.latest is not None and self.latest[0]() is x and self.latest[1] == _version(x)

    def absorb(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.squared_norm += torch.linalg.vector_norm(rows, dtype=torch.float64).item() ** 2
        if self.kept is not None:
            values, right = self.kept
            rows = torch.cat([values[:, None] * right, rows])
        left, values, _ = torch.linalg.svd(
            rows.T, full_matrices=False
        )  # turned: a wide matrix takes three times as long
        self.kept = (
            values[: self.rank].clone(),
            left.T[: self.rank].clone(),
        )  # a slice would keep the whole
        self.absorbed += 1
        self.latest = (ref(x), _version(x))

    def spectrum(self) -> InputSpectrum:
        assert self.kept is not None
        values, right = self.kept
        return InputSpectrum(right, values, self.squared_norm)


@dataclass
class _Listener:
    """Leads what each target receives to its stream."""

    rank: int
    widths: Mapping[str, int]
    streams: dict[str, _Stream] = field(default_factory=dict)
    """Target → its stream, the same for targets whose first input was one tensor."""
    received: Counter[str] = field(default_factory=Counter)

    def receive(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point() or x.shape[-1] != self.widths[name]:
            raise TargetError(
                f"{name} received {tuple(x.shape)} of {x.dtype}, not rows of {self.widths[name]}; only linear layers start from data"
            )
        if not torch.isfinite(x).all():
            raise ConfigError(
                f"an input of {name} is not finite; look at the batch and the model before starting from them"
            )
        if name not in self.streams:
            sharing = (stream for stream in self.streams.values() if stream.holds(x))
            self.streams[name] = next(sharing, None) or _Stream(self.rank)
        self.received[name] += 1
        if not self.streams[name].holds(x):
            self.streams[name].absorb(x)

    def spectra(self) -> dict[str, InputSpectrum]:
        for name in self.widths:
            if self.received[name] == 0 or self.streams[name].squared_norm == 0:
                raise TargetError(
                    f"{name} received no input other than zero; push batches that reach it, or leave it out of the targets"
                )
            if self.received[name] < self.streams[name].absorbed:
                raise TargetError(
                    f"{name} shares its input with another target in some batches only; start the two in separate calls"
                )
        return {name: self.streams[name].spectrum() for name in self.widths}


def _hear(
    listener: _Listener, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    listener.receive(name, (*args, *kwargs.values())[0])


def _version(x: Tensor) -> int:
    """Return what changes when a tensor is written to in place; tensors of inference mode do not count it."""
    return 0 if x.is_inference() else x._version


def _readers(model: nn.Module, names: Collection[str]) -> dict[str, tuple[nn.Module, int]]:
    """Return the linear layer at each path, as it computes now, and the width of what it reads."""
    known = plain_modules(model)
    for name in names:
        if name not in known:
            raise TargetError(
                f"the model has no module {name!r}; give paths as `plan_targets` names them"
            )
    modules = {name: module_at(model, name) for name in names}
    return {name: (module, _width(name, module)) for name, module in modules.items()}


def _width(name: str, module: nn.Module) -> int:
    weight = module.frozen if isinstance(module, LoraLinear) else base_weight(module)
    if weight is None:
        raise TargetError(
            f"{name} is no linear layer ({type(module).__name__}); only linear layers start from data"
        )
    return weight.shape[1]


def _check_rank(name: str, rank: int, in_features: int) -> None:
    if not 1 <= rank <= in_features:
        raise ConfigError(
            f"rank {rank} of {name}, which reads {in_features} features, must lie in 1 to {in_features}; choose another"
        )
