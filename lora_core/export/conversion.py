"""Convert an adapter of any age and layout to a program's format.

| format | result                                                                              |
|--------|-------------------------------------------------------------------------------------|
| peft   | the same tensors as safetensors under PEFT's present keys and settings              |
| vllm   | one rank and one scale, see export.py                                               |
| gguf   | a file for llama.cpp, see export.py                                                 |
| lora   | plain LoRA with the scale alpha / r; DoRA is approximated on its base, see refit.py |

Sources are adapters of PEFT of any version and of this library: safetensors or adapter_model.bin,
keys of wrapped models and of state dicts (see adapter/key_layouts.py), fields of old versions, and
module paths of a model whose modules were renamed since (see renamed_paths.py).
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lora_core.adapter.adapter_files import check_digests
from lora_core.adapter.contents import AdapterContents, read_contents
from lora_core.adapter.json_files import CONFIG
from lora_core.adapter.renaming import Rename
from lora_core.adapter.rewriting import write_adapter
from lora_core.errors import AdapterError, ExportError, LoraError
from lora_core.export.conversion_formats import (
    Conversion,
    PlainAdapter,
    to_gguf,
    to_lora,
    to_peft,
    to_vllm,
)
from lora_core.export.renamed_paths import with_renamed_paths
from lora_core.files import overlap
from lora_core.merging.adapted_weights import check_base

Format = Literal["peft", "vllm", "gguf", "lora"]
FORMATS: tuple[Format, ...] = get_args(Format)
OBSOLETE = ("merge_weights", "lora_nums", "blc_alpha", "blc_weight")
"""Settings of old PEFT versions and forks that do not change what the weights mean."""


@dataclass(frozen=True)
class ConversionOptions:
    """What a conversion needs in addition to the adapter."""

    base: Path | None = None
    """Folder of the base: required for gguf, and for DoRA to lora. If given, it is checked."""
    base_name: str = ""
    """Name of the base that the result records; empty keeps the recorded one."""
    rank: int | None = None
    """Of the result, for lora alone; None keeps the rank of each layer."""
    base_renames: Sequence[Rename] = ()
    """How the names of weights in the base's files differ from the modules of the adapter; see
    `merge_checkpoint`."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a module path → what replaces it, for a model that was renamed."""


def convert_adapter(
    source: Path, destination: Path, to: Format, options: ConversionOptions | None = None
) -> Conversion:
    """Convert the adapter in `source`; what it updates does not change unless it is approximated.

    Args:
        source: folder of an adapter; only read.
        destination: folder, or for gguf the file, that is created or replaced.
        to: the target format.
        options: see there.

    Raises:
        AdapterError: the adapter is damaged, or a setting has no present equivalent.
        ExportError: the format cannot express the adapter, an option is missing or does not apply,
            or the destination overlaps the source.
        BaseMismatchError, CheckpointError, MergeError: the base is not the adapter's, or cannot be
            read.
    """
    chosen = options or ConversionOptions()
    _check_destination(source, destination, to)
    _check_options(to, chosen)
    original = read_contents(source)
    if original.identity is not None:
        check_digests(source, original.identity)
    contents, changes = _present(original, chosen)
    if chosen.base is not None:
        check_base(contents, chosen.base, chosen.base_renames)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        write_adapter(folder, contents.tensors, values=contents.values, identity=contents.identity)
        adapter = PlainAdapter(replace(contents, folder=folder), source)
        try:
            conversion = _convert(adapter, destination, to, chosen)
        except LoraError as error:  # name the source instead of the copy, which is removed
            raise type(error)(str(error).replace(str(folder), str(source))) from error
    return replace(conversion, changes=(*changes, *conversion.changes))


def _convert(
    adapter: PlainAdapter, destination: Path, to: Format, options: ConversionOptions
) -> Conversion:
    if to == "peft":
        return to_peft(adapter, destination)
    if to == "vllm":
        return to_vllm(adapter, destination)
    if to == "gguf":
        return to_gguf(adapter, destination, options.base)
    return to_lora(adapter, destination, options.base, options.rank, options.base_renames)


def _check_destination(source: Path, destination: Path, to: Format) -> None:
    if overlap(source, destination):
        raise ExportError(
            f"{destination} overlaps {source}, which is only read; choose another destination"
        )
    if to == "gguf" and destination.is_dir():
        raise ExportError(f"{destination} is a folder; give the .gguf file to write")
    if to != "gguf" and destination.is_file():
        raise ExportError(f"{destination} is a file; give the folder to write for {to}")


def _check_options(to: Format, options: ConversionOptions) -> None:
    if to not in FORMATS:
        raise ExportError(f"{to!r} is not a format; use one of {', '.join(FORMATS)}")
    if options.rank is not None and to != "lora":
        raise ExportError(
            f"rank {options.rank} has no effect on a conversion to {to}; leave it out, or convert "
            "to lora first"
        )


def _present(
    original: AdapterContents, options: ConversionOptions
) -> tuple[AdapterContents, list[str]]:
    """Return the contents with present settings and paths, and what was changed."""
    changes = list(original.changes)
    values = {**original.values, "inference_mode": True}
    if values.pop("enable_lora", None) is not None:
        raise AdapterError(
            f"{original.folder / CONFIG} sets enable_lora, which adapted parts of a fused layer "
            "and has no present equivalent; merge the adapter with the PEFT that wrote it"
        )
    for name in OBSOLETE:
        if values.pop(name, None) is not None:
            changes.append(f"removed the obsolete setting {name}")
    if options.base_name:
        values["base_model_name_or_path"] = options.base_name
    contents = replace(original, values=values, identity=_identity(original, options))
    if options.renames:
        contents = with_renamed_paths(contents, options.renames)
        changes += [f"renamed {old} to {new}" for old, new in options.renames.items()]
    return contents, changes


def _identity(original: AdapterContents, options: ConversionOptions) -> dict[str, Any] | None:
    """Return the sidecar with the digest of the source in its lineage."""
    if original.identity is None:
        return None
    lineage = dict(original.identity.get("lineage", {}))
    lineage["converted_from"] = str(original.identity.get("adapter_sha256", ""))
    identity = {**original.identity, "lineage": lineage}
    if options.base_name:
        identity["base"] = options.base_name
    return identity
