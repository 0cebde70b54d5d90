"""The updates of an adapter, weight by weight and without a model: ΔW = s · B A.

Shapes: a (r, in), b (out, r), ΔW (out, in). A folder is read into one `Update` per module path;
`derived_adapter.py` writes updates as an adapter. Ranks and scales can differ from layer to layer.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapter.adapter_files import check_digests, check_values, read_tensors
from lora_core.adapter.json_files import CONFIG, PREFIX, read_identity, read_json
from lora_core.adapter.peft_config import read_config
from lora_core.base.identity import DENSE, ROUNDINGS, UNCHANGED, by_kind
from lora_core.base.weight_files import HEADS
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError, BaseMismatchError

EMBEDDING = re.compile(r"\.lora_embedding_([AB])$")
"""Suffix of the factors of an embedding's update, A (r, V) and B (D, r)."""
BASE_COPY = ".base_layer.weight"
"""Suffix of the base's weight, which PEFT saves next to the factors of an embedding or a head."""
PAIR_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
"""Key of one factor: module path and letter."""


@dataclass(frozen=True, eq=False)
class Update:
    """The low-rank update ΔW = scale · B A of one weight.

    Raises:
        AdapterError: the factors do not fit each other, or the scale is not above 0.
    """

    a: Tensor
    """(r, in)"""
    b: Tensor
    """(out, r)"""
    scale: float
    """Factor of B·A, above 0: a sign belongs into B."""
    embedding: bool = False
    """Whether the weight is an embedding's, which is stored as (in, out)."""

    def __post_init__(self) -> None:
        are_matrices = self.a.dim() == self.b.dim() == 2
        if not are_matrices or not (self.a.shape[0] == self.b.shape[1] >= 1):
            raise AdapterError(
                f"A of {tuple(self.a.shape)} and B of {tuple(self.b.shape)} "
                "are not the factors of one weight; give A (r, in), B (out, r)"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise AdapterError(
                f"the scale {self.scale} of an update must be finite and above 0; "
                "put a sign or a zero into B"
            )

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the updated weight."""
        return (self.b.shape[0], self.a.shape[1])

    def dense(self) -> Tensor:
        """Return ΔW, (out, in), in float32."""
        return self.scale * (self.b.float() @ self.a.float())

    def folded(self) -> "Update":
        """Return the same update with its scale multiplied into B, and scale 1."""
        return Update(self.a, self.scale * self.b, 1.0)


def read_updates(folder: Path, *, embeddings: bool = False) -> dict[str, Update]:
    """Read an adapter folder as module path → update, in float32, in the order of the paths.

    Args:
        folder: in PEFT's format.
        embeddings: also read the updates of embeddings, which are refused otherwise.

    The copies of the base's weights that PEFT saves with an update of the embedding or the output
    head are skipped.

    Raises:
        AdapterError: the folder is damaged, sets something that would be ignored here, or holds
            more than pure low-rank updates.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    identity = read_identity(folder)
    if config.target_parameters:
        raise AdapterError(
            f"{folder} updates stacks of experts ({', '.join(config.target_parameters)}), "
            "and only plain LoRA of linear layers is read; "
            "load it into a model to merge or serve it"
        )
    _refuse_tying(tensors, folder)
    embedded: set[str] = set()
    if embeddings:
        embedded = _embedded_modules(tensors)
        tensors = _with_linear_keys(tensors)
    tensors = without_base_copies(tensors)
    names = module_paths(tensors, folder)
    check_values(tensors, str(folder))
    if identity is not None:
        check_digests(folder, identity)
    updates = {}
    for name in names:
        update = _update(name, tensors, config, folder)
        updates[name] = replace(update, embedding=PREFIX + name in embedded)
    return updates


def _refuse_tying(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse an update of the embedding or the head that PEFT applies to both."""
    settings = read_json(folder / CONFIG)
    if not settings.get("ensure_weight_tying"):
        return
    for key in tensors:
        path = key.rpartition(".lora_")[0]
        is_head = path.rpartition(".")[2] in HEADS
        if is_head or EMBEDDING.search(key):
            raise AdapterError(
                f"{folder / CONFIG} sets ensure_weight_tying=True and trains {key}, so one update "
                "may apply to the embedding and the head; merge the adapter with PEFT"
            )


def _embedded_modules(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys of the embeddings with an update, up to the name of the factor."""
    return {key.rpartition(".")[0] for key in tensors if EMBEDDING.search(key)}


def _with_linear_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the factors of embeddings the names that those of linear layers have."""
    renamed = {}
    for key, tensor in tensors.items():
        linear_key = EMBEDDING.sub(r".lora_\1.weight", key)
        renamed[linear_key] = tensor
    return renamed


def without_base_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the base's weights that PEFT saves next to an update.

    Args:
        tensors: an adapter's tensors under PEFT's keys.
    """
    kept = {}
    for key, tensor in tensors.items():
        path = key.removesuffix(BASE_COPY)
        is_base_copy = path != key and f"{path}.lora_A.weight" in tensors
        if not is_base_copy:
            kept[key] = tensor
    return kept


def read_over_one_base(folders: Sequence[Path]) -> list[dict[str, Update]]:
    """Read several adapters that are used together and check that they have one base.

    An adapter without a sidecar names no base, so it is not checked.

    Args:
        folders: of the adapters, in PEFT's format.

    Returns:
        The updates of each, as `read_updates` returns them.

    Raises:
        AdapterError: see `read_updates`.
        BaseMismatchError: two of them were trained on different bases.
    """
    identities = {folder: read_identity(folder) for folder in folders}
    for (one, first), (other, second) in combinations(identities.items(), 2):
        if first is None or second is None:
            continue
        if not _same_base(first, second):
            base = first.get("base") or "an unnamed base"
            other_base = second.get("base") or "another"
            raise BaseMismatchError(
                f"{one} was trained on {base} and {other} on {other_base}, "
                "by the fingerprints or names in their sidecars; combine adapters of one base"
            )
    return [read_updates(folder) for folder in folders]


def module_paths(tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Return the paths of the updated modules, sorted.

    Args:
        tensors: an adapter's tensors under PEFT's keys.
        folder: of the adapter, for messages.

    Raises:
        AdapterError: there is no tensor, or one that is not a factor of a complete pair.
    """
    letters: dict[str, set[str]] = {}
    for key in sorted(tensors):
        match = PAIR_KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{folder} holds {key}, which is not a factor of a low-rank update; "
                "only plain LoRA of linear layers is read"
            )
        name, letter = match.groups()
        letters.setdefault(name, set()).add(letter)
    for name, found in letters.items():
        if found != {"A", "B"}:
            raise AdapterError(
                f"{folder} holds lora_{found.pop()} of {name} alone; "
                "fetch or train the adapter again"
            )
    if not letters:
        raise AdapterError(f"{folder} holds no tensor; fetch or train the adapter again")
    return sorted(letters)


def _update(
    name: str,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    folder: Path,
) -> Update:
    """Return the update of one module in float32."""
    a = tensors[f"{PREFIX}{name}.lora_A.weight"].float()
    b = tensors[f"{PREFIX}{name}.lora_B.weight"].float()
    try:
        scale = _scale(name, a.shape[0], config)
        return Update(a, b, scale)
    except AdapterError as error:
        raise AdapterError(f"{name} of {folder}: {error}") from error


def _scale(name: str, rank: int, config: LoraConfig) -> float:
    """Return the factor of one module's B·A."""
    expected = config.rank_of(name)
    if rank != expected:
        raise AdapterError(
            f"its rank is {rank}, but the config gives {expected}; fetch or train the adapter again"
        )
    return config.scale_of(name)


def _same_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Compare fingerprints of the same storage kind, or names and revisions if none is common.

    Two dense bases are one if any of their digests agree: each is of another rounding or method.
    """
    digests = by_kind(first.get("base_digests", {}))
    other_digests = by_kind(second.get("base_digests", {}))
    kinds = digests.keys() & other_digests.keys() - {UNCHANGED}
    if not kinds:
        return all(first.get(key) == second.get(key) for key in ("base", "revision"))
    differing = {kind for kind in kinds if digests[kind] != other_digests[kind]}
    dense_kinds = {DENSE, *ROUNDINGS}
    compared_dense = kinds & dense_kinds
    is_dense_same = not compared_dense or not compared_dense <= differing
    return is_dense_same and differing <= dense_kinds
