"""Find a base on this host without downloading it."""

from collections.abc import Callable
from pathlib import Path

from pipelines.config.recipe import local_path
from pipelines.errors import BaseModelError
from pipelines.tracking.pull_lock import LockedBase
from pipelines.workflow.stages import base_stage

CONFIG = "config.json"


def base_finder(runs: Path, folder: str) -> Callable[[LockedBase], Path | None]:
    """Return a function that finds a base on this host.

    Args:
        runs: folder of all runs.
        folder: of the base; empty to search for it.

    Raises:
        BaseModelError: it is not the folder of a model.
    """
    if folder and not (local_path(folder) / CONFIG).is_file():
        raise BaseModelError(
            f"{folder} is not the folder of a base model, because it has no {CONFIG}; give the "
            "folder that save_pretrained wrote"
        )

    def find(base: LockedBase) -> Path | None:
        return local_path(folder) if folder else find_local_base(base, runs)

    return find


def find_local_base(base: LockedBase, runs: Path) -> Path | None:
    """Return the folder of a base in Hugging Face format; None if it is not on this host.

    Args:
        base: named by a folder, a GGUF file, an embedded model or a hub id.
        runs: folder of all runs, which may have the base's stage.
    """
    folder = local_path(base.id)
    if (folder / CONFIG).is_file():
        return folder
    try:
        result = base_stage(base.id, base.revision or None, runs).result()
    except BaseModelError:  # a file that is not on this host
        return None
    if result is not None and (Path(result.folder) / CONFIG).is_file():
        return Path(result.folder)
    return _cached(base)


def _cached(base: LockedBase) -> Path | None:
    """Return the folder of a hub model in the local cache; its config alone is not a base."""
    from huggingface_hub import try_to_load_from_cache

    if base.id.count("/") != 1:
        return None
    path = try_to_load_from_cache(base.id, CONFIG, revision=base.revision or None)
    if not isinstance(path, str):
        return None
    folder = Path(path).parent
    return folder if any(folder.glob("*.safetensors")) else None
