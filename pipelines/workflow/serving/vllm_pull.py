"""Pull a registered adapter for a running vLLM, whose base must be the adapter's."""

import logging
from pathlib import Path

from lora_core.base.identity import FolderSource, is_recorded
from pipelines.errors import RegistryError
from pipelines.tracking.pull_lock import LockedBase
from pipelines.tracking.pulled import PulledAdapter, PullRequest, pull
from pipelines.tracking.references import Reference
from pipelines.workflow.local_base import find_local_base

log = logging.getLogger(__name__)


def pull_for_vllm(base_name: str, lora_name: str, runs: Path) -> PulledAdapter:
    """Return the verified export of an adapter that was trained on vLLM's base.

    Args:
        base_name: folder or hub id of vLLM's base.
        lora_name: such as models:/tickets@champion.
        runs: folder of all runs.

    Raises:
        RegistryError: it does not exist, was changed, or belongs to another base.
        LoraError: vLLM does not support it.
    """
    reference = Reference.parse(lora_name)
    folder = _base_folder(base_name, runs)

    def find_base(base: LockedBase) -> Path:
        _check_base(reference, base, folder)
        return folder

    return pull(PullRequest(str(reference), runs / "pulled", "vllm", find_base), runs)


def _base_folder(name: str, runs: Path) -> Path:
    """Return the folder of vLLM's base.

    Raises:
        RegistryError: it is not on this host.
    """
    named = LockedBase(id=name, revision="", quantization="", fingerprints={})
    folder = find_local_base(named, runs)
    if folder is None:
        raise RegistryError(
            f"the base {name!r} of vLLM is not a folder and not in the cache of this host, so its "
            "fingerprint cannot be verified; start vLLM with the folder of the base"
        )
    return folder


def _check_base(reference: Reference, base: LockedBase, folder: Path) -> None:
    """Refuse an adapter whose base is not verified to be the one in vLLM.

    Raises:
        RegistryError: see above.
    """
    if not base.fingerprints:
        raise RegistryError(
            f"{reference} has no fingerprint of its base, so that the base cannot be verified; "
            "serve a version that `lora run` registered"
        )
    if not is_recorded(FolderSource(folder), base.fingerprints):
        raise RegistryError(
            f"{reference} was trained on {base.id!r}, and vLLM has another base, {folder}; start "
            "vLLM with the base of the adapter"
        )
    if base.quantization not in ("", "none"):
        log.warning(
            "%s was trained on its base in %s; start vLLM with that quantization, or its answers "
            "differ from those of the evaluation",
            reference,
            base.quantization,
        )
