"""Write an adapter with present keys and settings in one of the formats of `conversion.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_core.adapter.adapter_files import check_values
from lora_core.adapter.contents import AdapterContents
from lora_core.adapter.key_layouts import MAGNITUDE
from lora_core.adapter.renaming import Rename
from lora_core.adapter.rewriting import write_adapter
from lora_core.errors import ExportError
from lora_core.export.export import VLLM_RANKS, export_gguf, export_vllm
from lora_core.export.gguf import gguf_architecture
from lora_core.export.refit import Approximation, overall_error, refit, truncated
from lora_core.spectrum.derived_adapter import write_updates
from lora_core.spectrum.updates import read_updates


@dataclass(frozen=True)
class Conversion:
    """What was written, and how it differs from the source."""

    destination: Path
    sha256: str
    """Of the weights file."""
    changes: tuple[str, ...] = ()
    """What is different from the source, in words."""
    relative_errors: Mapping[str, float] = field(default_factory=dict)
    """Module path → relative error of the approximation; empty if nothing was approximated."""
    relative_error: float = 0.0
    """Of all updates together."""


@dataclass(frozen=True, eq=False)
class PlainAdapter:
    """An adapter with present keys and settings, in memory and on disk."""

    contents: AdapterContents
    source: Path
    """Folder of the original, for messages."""

    @property
    def folder(self) -> Path:
        """Where its files are, for writers that read files."""
        return self.contents.folder


def to_peft(adapter: PlainAdapter, destination: Path) -> Conversion:
    """Write the adapter as it is."""
    contents = adapter.contents
    check_values(contents.tensors, str(adapter.source))
    sha256 = write_adapter(
        destination, contents.tensors, values=contents.values, identity=contents.identity
    )
    return Conversion(destination, sha256)


def to_vllm(adapter: PlainAdapter, destination: Path) -> Conversion:
    """Write the adapter with one rank, the smallest of vLLM's that is large enough, and scale 1."""
    _refuse_dora(adapter, "vLLM")
    ranks = [each.pair[0].shape[0] for each in adapter.contents.layers.values() if each.pair]
    largest = max(ranks, default=1)
    max_rank = min((rank for rank in VLLM_RANKS if rank >= largest), default=VLLM_RANKS[-1])
    sha256 = export_vllm(adapter.folder, destination, max_rank=max_rank)
    change = f"padded to rank {max_rank} with scale 1; vLLM needs a max_lora_rank of {max_rank}"
    return Conversion(destination, sha256, (change,))


def to_gguf(adapter: PlainAdapter, destination: Path, base: Path | None) -> Conversion:
    """Write the adapter for llama.cpp; the config of the base has the architecture."""
    _refuse_dora(adapter, "llama.cpp")
    if base is None:
        raise ExportError("a conversion to gguf needs the config.json of the base; name the base")
    architecture = gguf_architecture(base)
    sha256 = export_gguf(adapter.folder, destination, base_config=base, architecture=architecture)
    return Conversion(destination, sha256, (f"written for the architecture {architecture}",))


def to_lora(
    adapter: PlainAdapter,
    destination: Path,
    base: Path | None,
    rank: int | None,
    renames: Sequence[Rename],
) -> Conversion:
    """Write plain LoRA: DoRA is approximated on its base, other updates are truncated to `rank`."""
    if is_dora(adapter.contents):
        if base is None:
            raise ExportError(
                f"{adapter.source} is a DoRA, whose change of the weights depends on the base; "
                "name the base"
            )
        approximations = refit(adapter.contents, base, rank, renames)
        derived_by = "DoRA approximated by plain LoRA"
        return _written(adapter, destination, approximations, derived_by)
    updates = read_updates(adapter.folder)
    if rank is not None:
        approximations = truncated(updates, rank)
        return _written(adapter, destination, approximations, f"truncated to rank {rank}")
    sha256 = write_updates(
        destination, updates, like=adapter.folder, derived_by="written as plain LoRA"
    )
    return Conversion(destination, sha256)


def is_dora(contents: AdapterContents) -> bool:
    """Return whether the adapter trains the norms of rows."""
    return contents.scales.use_dora or bool(contents.magnitudes)


def _written(
    adapter: PlainAdapter,
    destination: Path,
    approximations: Mapping[str, Approximation],
    derived_by: str,
) -> Conversion:
    sha256 = write_updates(
        destination,
        {name: each.update for name, each in approximations.items()},
        like=_without_dora(adapter),
        derived_by=derived_by,
        parents=[adapter.folder],
    )
    return Conversion(
        destination,
        sha256,
        (derived_by,),
        {name: each.relative_error for name, each in approximations.items()},
        overall_error(approximations),
    )


def _without_dora(adapter: PlainAdapter) -> Path:
    """Return a folder with the same settings and sidecar, but without magnitudes."""
    contents = adapter.contents
    if not is_dora(contents):
        return adapter.folder
    folder = adapter.folder.with_name(f"{adapter.folder.name}-without-dora")
    tensors = contents.tensors
    plain = {key: tensors[key] for key in tensors if not key.endswith(MAGNITUDE)}
    values = {**contents.values, "use_dora": False}
    write_adapter(folder, plain, values=values, identity=contents.identity)
    return folder


def _refuse_dora(adapter: PlainAdapter, program: str) -> None:
    if is_dora(adapter.contents):
        raise ExportError(
            f"{adapter.source} is a DoRA, which {program} does not support; convert it to lora "
            "first, and the result to this format"
        )
