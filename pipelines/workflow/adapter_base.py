"""The folders that a command about an adapter reads: of the adapter, and of its base.

The base is named by the user, or found on this host. Only files are read, so a folder or a hub
model is used as it is. A GGUF file, such as the embedded model, is dequantized once into the folder
of runs.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_core.adapter.contents import read_contents
from lora_core.adapter.json_files import CONFIG, read_identity, read_json
from lora_core.export.conversion import Format, convert_adapter
from lora_core.export.conversion_formats import is_dora
from pipelines.console import print_status
from pipelines.errors import PipelineError
from pipelines.models.base_model import identify, locate
from pipelines.runtime import launcher
from pipelines.tracking.pull_lock import LockedBase
from pipelines.workflow.local_base import find_local_base
from pipelines.workflow.stages import base_stage


def named_base(name: str, runs: Path) -> Path:
    """Return the folder of a base that the user names; a hub model is downloaded if allowed.

    Args:
        name: a folder, a GGUF file, an embedded model or a hub id.
        runs: folder of all runs.

    Raises:
        BaseModelError: nothing exists under that name.
    """
    identity = identify(name, None)
    if identity.kind != "gguf":
        return locate(identity)
    found = _on_this_host(name, "", runs)
    if found is not None:
        return found
    print_status(f"converting {name} to float32 once")
    return Path(launcher.ensure_result(base_stage(name, None, runs), threads=1).folder)


def base_for_conversion(adapter: Path, to: Format, runs: Path) -> Path | None:
    """Return the folder of the recorded base if a conversion needs it and it is on this host.

    llama.cpp needs its sizes, and plain LoRA needs the weights that a DoRA changes.

    Raises:
        AdapterError: the adapter's files cannot be read.
    """
    is_needed = to == "gguf" or (to == "lora" and is_dora(read_contents(adapter)))
    return recorded_base(adapter, runs) if is_needed else None


def recorded_base(adapter: Path, runs: Path) -> Path | None:
    """Return the folder of the base that an adapter's files name; None if it is not on this host.

    Raises:
        AdapterError: the adapter's files cannot be read.
    """
    values = read_json(adapter / CONFIG)
    identity = read_identity(adapter) or {}
    name = identity.get("base") or values.get("base_model_name_or_path")
    revision = identity.get("revision") or values.get("revision")
    return _on_this_host(str(name), str(revision or ""), runs) if name else None


@contextmanager
def mergeable_adapter(adapter: Path) -> Iterator[Path]:
    """Yield the folder of an adapter, or of a copy under present keys if it has an old layout.

    Raises:
        PipelineError: it is a DoRA, whose merge would need the row norms of the base.
        AdapterError: its files cannot be read.
    """
    contents = read_contents(adapter)
    if is_dora(contents):
        raise PipelineError(
            f"{adapter} is a DoRA, which is not merged from files; convert it first with "
            "`lora adapter convert FOLDER DEST --to lora --rank RANK`, and merge the result"
        )
    if not contents.changes:
        yield adapter
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / adapter.name
        convert_adapter(adapter, copy, "peft")
        yield copy


def _on_this_host(name: str, revision: str, runs: Path) -> Path | None:
    base = LockedBase(id=name, revision=revision, quantization="", fingerprints={})
    return find_local_base(base, runs)
