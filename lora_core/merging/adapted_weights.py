"""The weights of a base that an adapter updates, read one at a time from the base's folder.

    W' = W + s·B A                                      LoRA
    W' = m ∘ (W + s·B A) / ‖W + s·B A‖, row by row      DoRA

Shapes: W, W' (out, in), also where the files store (in, out); m (out,).

Source: DoRA (Liu et al. 2024, arXiv 2402.09353), equation 5.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapter.adapter_files import check_fingerprint
from lora_core.adapter.contents import AdapterContents
from lora_core.adapter.peft_config import INITS
from lora_core.adapter.renaming import Rename
from lora_core.adapter.rewriting import write_low_rank_part
from lora_core.base.identity import DENSE, ROUNDINGS, FolderSource, by_kind
from lora_core.base.weight_files import Tensors, mapped_tensors
from lora_core.errors import AdapterError
from lora_core.merging.checkpoint_plan import CheckpointPlan, plan_checkpoint
from lora_core.spectrum.updates import Update


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """One weight of the base, with what an adapter trained for it."""

    weight: Tensor
    """W, (out, in), in the dtype of the files."""
    update: Update
    magnitude: Tensor | None = None
    """m, (out,), under DoRA."""

    def merged(self) -> Tensor:
        """Return W', (out, in), in float32."""
        total = self.weight.float() + self.update.dense()
        if self.magnitude is None:
            return total
        norms = torch.linalg.vector_norm(total, dim=1)
        factors: Tensor = self.magnitude.float() / norms.where(norms > 0, 1.0)
        return factors[:, None] * total


class AdaptedWeights(Mapping[str, AdaptedWeight]):
    """Module path → its weight and update; a weight is read when it is accessed."""

    def __init__(
        self, plan: CheckpointPlan, tensors: Tensors, magnitudes: Mapping[str, Tensor]
    ) -> None:
        self._plan = plan
        self._tensors = tensors
        self._magnitudes = magnitudes
        self._names = {step.module: name for name, step in plan.steps.items()}

    def __getitem__(self, module: str) -> AdaptedWeight:
        name = self._names[module]
        step = self._plan.steps[name]
        stored = self._tensors[self._plan.source_of(name)]
        weight = stored.T if step.transposed else stored
        return AdaptedWeight(weight, step.update, self._magnitudes.get(module))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, module: str) -> tuple[int, int]:
        """Return (out, in) of a weight without reading it."""
        return self._plan.steps[self._names[module]].update.shape


@contextmanager
def adapted_weights(
    contents: AdapterContents, base: Path, renames: Sequence[Rename] = ()
) -> Iterator[AdaptedWeights]:
    """Open the weights of the folder `base` that an adapter updates, while the block runs.

    Args:
        contents: of the adapter.
        base: folder of the dense base.
        renames: see `merge_checkpoint`.

    Raises:
        CheckpointError: the base is incomplete or quantized.
        AdapterError: the adapter is malformed, or its initialization changed the base.
        MergeError: the base lacks a target, or has it in another shape.
    """
    _refuse_changed_base(contents)
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "updates"
        write_low_rank_part(contents, plain)
        plan = plan_checkpoint(base, plain, None, renames)
    _check_magnitudes(plan, contents)
    entries = {}
    for name in plan.steps:
        source = plan.source_of(name)
        entries[source] = plan.checkpoint.entries[source]
    with mapped_tensors(base, entries) as tensors:
        yield AdaptedWeights(plan, tensors, contents.magnitudes)


def check_base(contents: AdapterContents, base: Path, renames: Sequence[Rename] = ()) -> str:
    """Check that an adapter was trained on the base in a folder; return what was compared.

    Without a recorded fingerprint of a dense base, the shapes of the adapted weights are compared.

    Args:
        contents: of the adapter.
        base: folder of the dense base.
        renames: see `merge_checkpoint`.

    Raises:
        BaseMismatchError: the adapter was trained on another base.
        AdapterError, CheckpointError, MergeError: see `adapted_weights`.
    """
    identity = contents.identity or {}
    recorded = by_kind(identity.get("base_digests", {}))
    if recorded.keys() & {DENSE, *ROUNDINGS}:
        check_fingerprint(FolderSource(base), adapter=contents.folder, identity=identity)
        return f"{base} has the recorded fingerprint"
    with adapted_weights(contents, base, renames) as weights:
        number = len(weights)
    return f"{base} has {number} adapted weights of the right shapes; no fingerprint is recorded"


def _refuse_changed_base(contents: AdapterContents) -> None:
    """Refuse an adapter over another weight than the base's, such as PiSSA's residual."""
    method = contents.values.get("init_lora_weights", True)
    if method not in INITS:
        raise AdapterError(
            f"{contents.folder} sets init_lora_weights={method!r}, which changes the base, so its "
            "updates do not belong to the base's weights; save it as plain LoRA with PEFT"
        )


def _check_magnitudes(plan: CheckpointPlan, contents: AdapterContents) -> None:
    """Refuse a magnitude that does not fit its weight, or a DoRA without all of them."""
    for step in plan.steps.values():
        magnitude = contents.magnitudes.get(step.module)
        expected = (step.update.shape[0],)
        found = None if magnitude is None else tuple(magnitude.shape)
        if found != expected and (contents.scales.use_dora or magnitude is not None):
            raise AdapterError(
                f"{contents.folder} has a DoRA magnitude of the shape {found} for {step.module}, "
                f"but it must be {expected}; fetch or train the adapter again"
            )
