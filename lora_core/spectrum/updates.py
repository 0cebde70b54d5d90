"""The updates of an adapter, weight by weight and without a model: ΔW = s · B A.

Shapes: a (r, in), b (out, r), ΔW (out, in). A folder is read into one `Update` per module path. A
set of updates is written as a PEFT adapter derived from another one; its ranks and scales can
differ from layer to layer.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_core.adapter.adapter_files import (
    CONFIG,
    IDENTITY,
    PREFIX,
    WEIGHTS,
    check_digests,
    check_values,
    file_digests,
    pattern_for,
    read_identity,
    read_json,
    read_tensors,
)
from lora_core.adapter.peft_config import read_config
from lora_core.base.identity import DENSE, ROUNDINGS, UNCHANGED, by_kind
from lora_core.base.weight_files import HEADS
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError, BaseMismatchError
from lora_core.files import atomic_folder, sha256_of_file, write_json

EMBEDDING = re.compile(r"\.lora_embedding_([AB])$")
"""Suffix of the factors of an embedding's update, A (r, V) and B (D, r)."""
BASE_COPY = ".base_layer.weight"
"""Suffix of the base's weight, which PEFT saves next to the factors of an embedding or a head."""
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that exclude some of the modules that target_modules names."""
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
        if not (are_matrices and self.a.shape[0] == self.b.shape[1] >= 1):
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
        embedded = {key.rpartition(".")[0] for key in tensors if EMBEDDING.search(key)}
        tensors = {
            EMBEDDING.sub(r".lora_\1.weight", key): tensor for key, tensor in tensors.items()
        }
    tensors = _without_base_copies(tensors)
    names = _module_paths(tensors, folder)
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
    if not read_json(folder / CONFIG).get("ensure_weight_tying"):
        return
    for key in tensors:
        if EMBEDDING.search(key) or key.rpartition(".lora_")[0].rpartition(".")[2] in HEADS:
            raise AdapterError(
                f"{folder / CONFIG} sets ensure_weight_tying=True and trains {key}, so one update "
                "may apply to the embedding and the head; merge the adapter with PEFT"
            )


def _without_base_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the base's weights that PEFT saves next to an update."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not (
            key.endswith(BASE_COPY) and f"{key.removesuffix(BASE_COPY)}.lora_A.weight" in tensors
        )
    }


def read_over_one_base(folders: Sequence[Path]) -> list[dict[str, Update]]:
    """Read several adapters that are used together and check that they have one base.

    An adapter without a sidecar names no base, so it is not checked.

    Raises:
        AdapterError: see `read_updates`.
        BaseMismatchError: two of them were trained on different bases.
    """
    identities = {folder: read_identity(folder) for folder in folders}
    for (one, first), (other, second) in combinations(identities.items(), 2):
        if first is not None and second is not None and not _same_base(first, second):
            base = first.get("base") or "an unnamed base"
            other_base = second.get("base") or "another"
            raise BaseMismatchError(
                f"{one} was trained on {base} and {other} on {other_base}, "
                "by the fingerprints or names in their sidecars; combine adapters of one base"
            )
    return [read_updates(folder) for folder in folders]


def write_updates(
    folder: Path,
    updates: Mapping[str, Update],
    *,
    like: Path,
    derived_by: str,
    parents: Sequence[Path] = (),
) -> str:
    """Write `updates` as a PEFT adapter; return the SHA-256 of its weights file.

    The scale is written as alpha/r, even if `like` uses alpha/√r. rank_pattern and alpha_pattern
    list the layers whose rank or alpha differs from those of the widest layer; vLLM ignores both.

    Args:
        folder: created or replaced; it appears complete or not at all.
        updates: module path → update.
        like: the adapter whose settings and sidecar are copied; without a sidecar none is written.
        derived_by: the operation, such as `truncated to rank 4`, for the sidecar's lineage.
        parents: the source adapters, which the lineage lists by digest; the default is `like`.

    Raises:
        AdapterError: there is nothing to write, a value is not finite, or `like` cannot be read.
    """
    if not updates:
        raise AdapterError(f"there is no update to write to {folder}; give at least one")
    tensors = _tensors(updates)
    check_values(tensors, "the updates")
    config = _peft_config(updates, like)
    identity = read_identity(like)
    digests = [sha256_of_file(parent / WEIGHTS) for parent in parents or [like]]
    history = {"derived_by": derived_by, "derived_from": ", ".join(digests)}
    with atomic_folder(folder) as temporary:
        save_file(tensors, str(temporary / WEIGHTS), metadata={"format": "pt"})
        sha256 = sha256_of_file(temporary / WEIGHTS)
        write_json(temporary / CONFIG, config)
        if identity is not None:
            lineage = {**identity.get("lineage", {}), **history}
            derived = {**identity, "lineage": lineage, **file_digests(temporary, tensors)}
            write_json(temporary / IDENTITY, derived)
    return sha256


def _module_paths(tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Return the module paths in order; every key must be one factor of a pair."""
    letters: dict[str, set[str]] = {}
    for key in sorted(tensors):
        match = PAIR_KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{folder} holds {key}, which is not a factor of a low-rank update; "
                "only plain LoRA of linear layers is read"
            )
        letters.setdefault(match[1], set()).add(match[2])
    for name, found in letters.items():
        if found != {"A", "B"}:
            raise AdapterError(
                f"{folder} holds lora_{found.pop()} of {name} alone; "
                "fetch or train the adapter again"
            )
    if not letters:
        raise AdapterError(f"{folder} holds no tensor; fetch or train the adapter again")
    return sorted(letters)


def _update(name: str, tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> Update:
    a = tensors[f"{PREFIX}{name}.lora_A.weight"].float()
    b = tensors[f"{PREFIX}{name}.lora_B.weight"].float()
    try:
        return Update(a, b, _scale(name, a.shape[0], config))
    except AdapterError as error:
        raise AdapterError(f"{name} of {folder}: {error}") from error


def _scale(name: str, rank: int, config: LoraConfig) -> float:
    """Return the factor of one module's B·A."""
    if rank != config.rank_of(name):
        raise AdapterError(
            f"its rank is {rank}, but the config gives {config.rank_of(name)}; "
            "fetch or train the adapter again"
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
    of_dense = {DENSE, *ROUNDINGS}
    if kinds & of_dense and not kinds & of_dense - differing:
        return False
    return not differing - of_dense


def _tensors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Return the factors under PEFT's keys, each in separate memory as safetensors requires."""
    tensors = {}
    for name, update in updates.items():
        for letter, factor in (("A", update.a), ("B", update.b)):
            copy = factor.detach().to("cpu", torch.float32, copy=True)
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = copy.contiguous()
    return tensors


def _peft_config(updates: Mapping[str, Update], like: Path) -> dict[str, Any]:
    """Return the settings of `like` with the ranks, scales and modules of `updates`."""
    read_config(like)
    config = read_json(like / CONFIG)
    if set(updates) != set(_module_paths(_without_base_copies(read_tensors(like)), like)):
        config["target_modules"] = sorted(updates)
        config |= {key: None for key in NARROWING if key in config}
    widest = max(updates.values(), key=lambda update: update.rank)
    rank_pattern = {}
    alpha_pattern = {}
    for name, update in updates.items():
        if update.rank != widest.rank:
            rank_pattern[pattern_for(name, updates)] = update.rank
        if _alpha(update) != _alpha(widest):
            alpha_pattern[pattern_for(name, updates)] = _alpha(update)
    return {
        **config,
        "r": widest.rank,
        "lora_alpha": _alpha(widest),
        "use_rslora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "inference_mode": True,
    }


def _alpha(update: Update) -> float:
    alpha = update.scale * update.rank
    return int(alpha) if alpha.is_integer() else alpha
