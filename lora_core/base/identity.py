"""Identify a base by digests of its weights that are the same wherever it is loaded.

A dense base is identified by how often each value, rounded to bfloat16, occurs in it. transformers
renames, fuses, splits and transposes weights when it loads a checkpoint; none of that changes the
counts, so a folder and the model loaded from it have one fingerprint. Reading every value takes
time. Therefore an adapter's sidecar also records digests of a fixed, evenly spaced sample of each
tensor, under its name: if one of them matches, the values are not counted.

    dense                   counts of values in bfloat16
    dense-sampled           names, shapes and samples, rounded to bfloat16
    dense-sampled-float16   names, shapes and samples, rounded to float16
    dense-unchanged         dense-sampled without the weights that the adapter supplies
    nf4, fp4, int8          names, shapes and samples of the packed codes

Copies of one checkpoint in float32, bfloat16 and float16 agree in one of the two roundings. The
codes of a quantized base differ from the dense values by design, so each kind has its own digest.
Sidecars of earlier versions record dense-sampled as `dense`, without the prefix of `VALUES`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lora_core.base.quant import Kind, kind_of
from lora_core.base.weight_files import CONFIG, Checkpoint, mapped_tensors, open_checkpoint
from lora_core.errors import CheckpointError
from lora_core.modules import plain_modules, plain_parameters, unwrapped

SAMPLES_PER_TENSOR = 256
VALUES_PER_PIECE = 1 << 18
"""How many values are counted at once: their codes fit a processor's cache."""
CODES = 1 << 16
"""Number of bfloat16 values."""
VALUES = "values-1:"
"""Prefix of a digest of counts: the version of the method."""
DENSE = "dense"
SAMPLED = "dense-sampled"
SAMPLED_FLOAT16 = "dense-sampled-float16"
UNCHANGED = "dense-unchanged"
ROUNDINGS = {SAMPLED: torch.bfloat16, SAMPLED_FLOAT16: torch.float16}
"""Kind of digest of samples → the dtype they are rounded to."""
STATISTICS = (".running_mean", ".running_var")
"""Endings of buffers that a forward pass in training mode changes."""


class WeightSource(Protocol):
    """A base whose digests can be computed: a model or a checkpoint folder."""

    @property
    def kind(self) -> Kind: ...

    @property
    def fingerprint(self) -> str:
        """The digest that identifies the base among those of its kind."""

    @property
    def float16_fingerprint(self) -> str:
        """The fingerprint of the dense base after a conversion to float16."""

    @property
    def samples(self) -> dict[str, str]:
        """The digests of samples, by kind of digest; empty for a quantized base."""


@dataclass(frozen=True)
class ModelSource:
    """A model in memory; an adapter in it is ignored."""

    model: nn.Module
    supplied: Mapping[str, Tensor | None] = field(default_factory=dict)
    """Path of a module that an adapter replaces → the rows of its weight that it supplies, or None
    for all its weights. The base need not have the same."""

    @property
    def kind(self) -> Kind:
        return kind_of(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """The digest that `fingerprint` returns."""
        if self.kind != DENSE:
            return digest_of(self._parameters)
        return value_digest(self._stored())

    @cached_property
    def float16_fingerprint(self) -> str:
        """The fingerprint of the dense base after a conversion to float16."""
        return value_digest(self._stored(), torch.float16)

    @cached_property
    def samples(self) -> dict[str, str]:
        """The digests of samples, by kind of digest; empty for a quantized base."""
        if self.kind != DENSE:
            return {}
        digests = _sample_digests(self._parameters)
        if self.supplied:
            digests[UNCHANGED] = digest_of(self._unchanged())
        return digests

    def _unchanged(self) -> dict[str, Tensor]:
        """Return the parameters without those, or their rows, that the adapter supplies."""
        kept = dict(self._parameters)
        for path, rows in self.supplied.items():
            for name in self._parameters:
                if rows is None and name.startswith(f"{path}."):
                    del kept[name]
                elif rows is not None and name == f"{path}.weight":
                    kept[name] = _without_rows(kept[name], rows)
        return kept

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        named = plain_parameters(self.model)
        tensors = {name: parameter.detach() for name, parameter in named.items()}
        offloaded = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
        if offloaded is not None:
            raise CheckpointError(
                f"{offloaded} is on the meta device, so the model has no fingerprint: it is "
                "offloaded or was built without weights; load it without offloading, "
                "or pass check_base=False where an adapter is loaded"
            )
        return tensors

    def _stored(self) -> Iterator[Tensor]:
        """Yield what transformers saves of the model: parameters and persistent buffers."""
        unsaved = getattr(unwrapped(self.model), "_keys_to_ignore_on_save", None) or ()
        for name, tensor in (self._parameters | _persistent_buffers(self.model)).items():
            if name not in unsaved and not name.endswith(STATISTICS):
                yield tensor


@dataclass(frozen=True)
class FolderSource:
    """A dense model saved in a folder. A tied output head counts once, even if it is stored."""

    folder: Path

    @property
    def kind(self) -> Kind:
        return "dense"

    @cached_property
    def fingerprint(self) -> str:
        """The digest that `fingerprint_of_folder` returns."""
        return self._count()

    @cached_property
    def float16_fingerprint(self) -> str:
        """The fingerprint of the dense base after a conversion to float16."""
        return self._count(torch.float16)

    @cached_property
    def samples(self) -> dict[str, str]:
        """The digests of samples, by kind of digest."""
        with self._tensors() as tensors:
            return _sample_digests(tensors)

    def _count(self, converted_to: torch.dtype | None = None) -> str:
        with self._tensors() as tensors:
            names = [name for name in tensors if not name.endswith(STATISTICS)]
            return value_digest((tensors[name] for name in names), converted_to)

    def _tensors(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        checkpoint = open_checkpoint(self.folder)
        copy = _tied_copy(checkpoint)
        entries = {name: entry for name, entry in checkpoint.entries.items() if name != copy}
        return mapped_tensors(self.folder, entries) if entries else nullcontext({})


def fingerprint(model: nn.Module) -> tuple[Kind, str]:
    """Return how the model's linear layers are stored and the digest of its frozen weights.

    An injected adapter is ignored: the base model is identified.

    Raises:
        CheckpointError: a weight is on the meta device.
    """
    source = ModelSource(model)
    return source.kind, source.fingerprint


def fingerprint_of_folder(folder: Path) -> tuple[Kind, str]:
    """Return the `fingerprint` of the dense model saved in `folder`, of any float dtype.

    Raises:
        CheckpointError: the folder has no complete checkpoint.
    """
    return "dense", FolderSource(folder).fingerprint


def recorded_digests(source: WeightSource) -> dict[str, str]:
    """Return all digests of a base that a sidecar records."""
    return {source.kind: source.fingerprint, **source.samples}


def is_recorded(source: WeightSource, recorded: Mapping[str, str]) -> bool:
    """Return whether the digests of a sidecar identify the base `source`."""
    if source.kind != DENSE:
        return recorded.get(source.kind) == source.fingerprint
    known = by_kind(recorded)
    if not known.keys() & {DENSE, *ROUNDINGS}:
        return False
    if shares_any(source.samples, known):
        return True
    return _has_fingerprint(source, known.get(DENSE)) or _is_recorded_at_origin(source, known)


def by_kind(recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of a sidecar under the current names of their kinds."""
    known = dict(recorded)
    if not known.get(DENSE, VALUES).startswith(VALUES):
        known[SAMPLED] = known.pop(DENSE)
    return known


def shares_any(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether two sets of digests agree in one."""
    return any(one[kind] == other[kind] for kind in one.keys() & other.keys())


def _has_fingerprint(source: WeightSource, digest: str | None) -> bool:
    """Return whether `digest` is the dense base's fingerprint, with or without a conversion."""
    return digest is not None and digest in (source.fingerprint, source.float16_fingerprint)


def _is_recorded_at_origin(source: WeightSource, known: Mapping[str, str]) -> bool:
    """Return whether the folder that a model was loaded from has its weights and is recorded.

    float16 and bfloat16 copies of a float32 checkpoint share no rounding, but each shares one with
    the checkpoint.
    """
    if not isinstance(source, ModelSource):
        return False
    path = getattr(getattr(unwrapped(source.model), "config", None), "_name_or_path", "")
    if not (path and (Path(path) / CONFIG).is_file()):
        return False
    origin = FolderSource(Path(path))
    try:
        if shares_any(origin.samples, source.samples) and shares_any(origin.samples, known):
            return True
        is_copy = _has_fingerprint(origin, source.fingerprint)
        return is_copy and _has_fingerprint(origin, known.get(DENSE))
    except CheckpointError:
        return False


def digest_of(tensors: Mapping[str, Tensor], rounding: torch.dtype = torch.bfloat16) -> str:
    """Return the SHA-256 over names, shapes and sampled values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tuple(tensor.shape)}:".encode())
        total.update(_sample(tensor, rounding))
    return total.hexdigest()


def value_digest(tensors: Iterable[Tensor], converted_to: torch.dtype | None = None) -> str:
    """Return the digest of how often each bfloat16 value occurs in the floating-point tensors.

    Args:
        tensors: in any order.
        converted_to: the dtype that the values are converted to first.
    """
    counts = torch.zeros(CODES, dtype=torch.int64)
    for tensor in tensors:
        if tensor.is_floating_point():
            counts += _count_values(tensor.detach(), converted_to or tensor.dtype).cpu()
    return VALUES + hashlib.sha256(counts.numpy().tobytes()).hexdigest()


def _count_values(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    counts = torch.zeros(CODES, dtype=torch.int64, device=tensor.device)
    for piece in tensor.reshape(-1).split(VALUES_PER_PIECE):
        rounded = piece.to(dtype).to(torch.bfloat16)
        codes = rounded.view(torch.int16).to(torch.int32) + CODES // 2
        counts += torch.bincount(codes, minlength=CODES)
    return counts


def _sample_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {kind: digest_of(tensors, rounding) for kind, rounding in ROUNDINGS.items()}


def _sample(tensor: Tensor, rounding: torch.dtype) -> bytes:
    flat = tensor.reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    indices = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    values = flat[indices].cpu()
    if values.is_floating_point():
        values = values.to(rounding).view(torch.int16)
    return bytes(values.contiguous().view(torch.uint8).tolist())


def _without_rows(weight: Tensor, rows: Tensor) -> Tensor:
    is_kept = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    is_kept[rows.to(weight.device)] = False
    return weight[is_kept]


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of the model, without those of an adapter, that a checkpoint stores."""
    found: dict[str, Tensor] = {}
    for path, module in plain_modules(model).items():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".removeprefix(".")] = buffer
    return found


def _tied_copy(checkpoint: Checkpoint) -> str | None:
    """Return the name of a tied head's weight if the files store it and the embedding's."""
    head = next(filter(checkpoint.is_tied_copy, checkpoint.entries), None)
    if head is None:
        return None
    entry = checkpoint.entries[head]
    same_shape = {
        name: other for name, other in checkpoint.entries.items() if other.shape == entry.shape
    }
    with mapped_tensors(checkpoint.folder, same_shape) as tensors:
        for name in same_shape:
            if name != head and torch.equal(tensors[name], tensors[head]):
                return head
    return None
