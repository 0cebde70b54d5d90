"""The strongest directions of the inputs of layers, computed batch by batch.

Each input is appended to the k directions kept so far, diag(σ) · Vᵀ, and decomposed again, so a
layer needs at most k + (rows of the input) rows. The result is exact while the inputs span at most
k directions; after that, the strongest directions are approximate. Targets that read the same
tensor, such as q, k and v, share one decomposition.

Shapes: inputs (…, in), one row per token; k directions of `in` numbers.

Source: incremental SVD (Ross et al. 2008, IJCV 77).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from lora_core.errors import ConfigError, TargetError


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


class _KeptDirections(NamedTuple):
    """diag(values) · right: what a stream keeps of its inputs."""

    values: Tensor
    """(k,), singular values, descending"""
    right: Tensor
    """(k, in), orthonormal rows"""


class _AbsorbedTensor(NamedTuple):
    """A tensor that was absorbed, and its version at that time."""

    tensor: ref[Tensor]
    version: int


@dataclass
class _Stream:
    """The incremental decomposition of inputs that one or several layers receive."""

    rank: int
    """Maximum number of directions to keep."""
    kept: _KeptDirections | None = None
    squared_norm: float = 0.0
    """Σ‖x‖² over all rows so far."""
    absorbed: int = 0
    """Number of tensors so far."""
    latest: _AbsorbedTensor | None = None

    def has_just_absorbed(self, x: Tensor) -> bool:
        """Return whether this same tensor, unchanged, was the last to be absorbed."""
        if self.latest is None:
            return False
        is_same = self.latest.tensor() is x
        return is_same and self.latest.version == _version(x)

    def absorb(self, x: Tensor) -> None:
        """Append the rows of `x`, (…, in), to the directions kept so far."""
        width = x.shape[-1]
        rows = x.reshape(-1, width).float()
        norm = torch.linalg.vector_norm(rows, dtype=torch.float64).item()
        self.squared_norm += norm**2
        if self.kept is not None:
            previous = self.kept.values[:, None] * self.kept.right
            rows = torch.cat([previous, rows])
        # Transposed, because a wide matrix takes three times as long.
        left, values, _ = torch.linalg.svd(rows.T, full_matrices=False)
        # Cloned, because a slice would keep the complete tensor in memory.
        self.kept = _KeptDirections(
            values=values[: self.rank].clone(),
            right=left.T[: self.rank].clone(),
        )
        self.absorbed += 1
        self.latest = _AbsorbedTensor(ref(x), _version(x))

    def spectrum(self) -> InputSpectrum:
        """Return the result; at least one tensor was absorbed."""
        assert self.kept is not None
        return InputSpectrum(
            right=self.kept.right,
            values=self.kept.values,
            squared_norm=self.squared_norm,
        )


@dataclass
class InputRecorder:
    """Passes the inputs of each target to its stream."""

    rank: int
    """Maximum number of directions to keep per stream."""
    widths: Mapping[str, int]
    """Target → features of its input."""
    streams: dict[str, _Stream] = field(default_factory=dict)
    """Target → its stream; targets whose first input was the same tensor share one."""
    received: Counter[str] = field(default_factory=Counter)
    """Target → number of inputs."""

    def receive(self, name: str, x: Tensor) -> None:
        """Pass one input, (…, in), of the target `name` to its stream."""
        _check_input(name, x, self.widths[name])
        if name not in self.streams:
            self.streams[name] = self._stream_for(x)
        self.received[name] += 1
        stream = self.streams[name]
        if not stream.has_just_absorbed(x):
            stream.absorb(x)

    def spectra(self) -> dict[str, InputSpectrum]:
        """Return the result of each target, or raise if one has none."""
        spectra = {}
        for name in self.widths:
            stream = self.streams.get(name)
            if stream is None or stream.squared_norm == 0:
                raise TargetError(
                    f"{name} received no input other than zero; run batches that reach it, "
                    "or exclude it from the targets"
                )
            if self.received[name] < stream.absorbed:
                raise TargetError(
                    f"{name} shares its input with another target in some batches only; "
                    "initialize the two in separate calls"
                )
            spectra[name] = stream.spectrum()
        return spectra

    def _stream_for(self, x: Tensor) -> _Stream:
        """Return the stream that has just absorbed `x` for another target, or a new one."""
        for stream in self.streams.values():
            if stream.has_just_absorbed(x):
                return stream
        return _Stream(self.rank)


def _check_input(name: str, x: Tensor, width: int) -> None:
    """Refuse an input of a target that is not finite rows of `width` numbers."""
    if not x.is_floating_point() or x.shape[-1] != width:
        raise TargetError(
            f"{name} received {tuple(x.shape)} of {x.dtype}, not rows of {width}; "
            "only linear layers can be initialized from data"
        )
    if not torch.isfinite(x).all():
        raise ConfigError(f"an input of {name} is not finite; check the batch and the model")


def _version(x: Tensor) -> int:
    """Return a counter of in-place writes to a tensor; tensors of inference mode have none."""
    return 0 if x.is_inference() else x._version
