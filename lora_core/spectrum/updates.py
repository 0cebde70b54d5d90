"""The updates of an adapter, weight by weight and without a model: ΔW = s · B A.

Shapes: a (r, in), b (out, r), ΔW (out, in). A folder is read into one `Update` for each module path; a set of updates is
written as a PEFT adapter derived from another, whose ranks and scales may differ from layer to layer.

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
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError, BaseMismatchError
from lora_core.files import folder_written_aside, sha256_of_file, write_json

EMBEDDING = re.compile(r"\.lora_embedding_([AB])$")
"""How the factors of an embedding's update are called, A (r, V) and B (D, r)."""
BASE_COPY = ".base_layer.weight"
"""How the base's own weight is called, which PEFT saves beside them."""
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that leave out some of the modules that target_modules names."""


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
    """Whether it is of an embedding, whose weight is stored as (in, out)."""

    def __post_init__(self) -> None:
        if not (self.a.dim() == self.b.dim() == 2 and self.a.shape[0] == self.b.shape[1] >= 1):
            raise AdapterError(
                f"A of {tuple(self.a.shape)} and B of {tuple(self.b.shape)} are not the factors of one weight; give A (r, in), B (out, r)"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise AdapterError(
                f"the scale {self.scale} of an update must be finite and above 0; put a sign or a zero into B"
            )

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that is updated."""
        return (self.b.shape[0], self.a.shape[1])

    def dense(self) -> Tensor:
        """Return ΔW, (out, in), in float32."""
        return self.scale * (self.b.float() @ self.a.float())

    def folded(self) -> "Update":
        """Return the same update with its scale inside B, and 1 in its place."""
        return Update(self.a, self.scale * self.b, 1.0)


def read_updates(folder: Path, *, embeddings: bool = False) -> dict[str, Update]:
    """Read an adapter folder as module path → update, in float32, in the order of the paths.

    Args:
        folder: in PEFT's format.
        embeddings: read the updates of embeddings too; else they are refused. The base's own weights, of which PEFT saves a
            copy beside them, are left out.

    Raises:
        AdapterError: the folder is damaged, asks for what is ignored here, or holds more than pure low-rank updates.
    """
    config, tensors, identity = read_config(folder), read_tensors(folder), read_identity(folder)
    if config.target_parameters:
        raise AdapterError(
            f"{folder} updates stacks of experts ({', '.join(config.target_parameters)}), and only plain LoRA of linear layers is read; "
            "load it into a model to merge or serve it"
        )
    turned = {key.rpartition(".")[0] for key in tensors if embeddings and EMBEDDING.search(key)}
    copies = {f"{module}{BASE_COPY}" for module in turned}
    tensors = {
        EMBEDDING.sub(r".lora_\1.weight", key) if embeddings else key: one
        for key, one in tensors.items()
        if key not in copies
    }
    names = _module_paths(tensors, folder)
    check_values(tensors, str(folder))
    if identity is not None:
        check_digests(folder, identity)
    found = {name: _update(name, tensors, config, folder) for name in names}
    return {
        name: replace(update, embedding=PREFIX + name in turned) for name, update in found.items()
    }


def read_over_one_base(folders: Sequence[Path]) -> list[dict[str, Update]]:
    """Read several adapters that are to act together; an adapter without our sidecar names no base that could be checked.

    Raises:
        AdapterError: see `read_updates`.
        BaseMismatchError: two of them were trained on different bases.
    """
    identities = {folder: read_identity(folder) for folder in folders}
    for (one, first), (other, second) in combinations(identities.items(), 2):
        if first is not None and second is not None and not _same_base(first, second):
            raise BaseMismatchError(
                f"{one} was trained on {first.get('base') or 'an unnamed base'} and {other} on {second.get('base') or 'another'}, "
                "by the fingerprints or names beside them; combine adapters of one base"
            )
    return [read_updates(folder) for folder in folders]


def write_updates(
    folder: Path,
    updates: Mapping[str, Update],
    *,
    like: Path,
    done: str,
    parents: Sequence[Path] = (),
) -> str:
    """Write `updates` as a PEFT adapter; return the SHA-256 of its weights file.

    The scale is written as alpha/r, also where `like` had alpha/√r. A layer whose rank or alpha differs from those of
    the widest is named in rank_pattern or alpha_pattern; vLLM ignores both.

    Args:
        folder: created or replaced; it appears complete or not at all.
        updates: module path → update.
        like: the adapter whose settings and sidecar are carried over; without a sidecar there, none is written.
        done: what was done, such as `truncated to rank 4`; recorded in the sidecar's lineage.
        parents: the adapters that went in, named by digest in the lineage; `like` unless given.

    Raises:
        AdapterError: nothing to write, a value that is not finite, or a `like` that cannot be read.
    """
    if not updates:
        raise AdapterError(f"there is no update to write to {folder}; give at least one")
    tensors = _tensors(updates)
    check_values(tensors, "the updates")
    config, identity = _peft_config(updates, like), read_identity(like)
    history = {
        "derived_by": done,
        "derived_from": ", ".join(sha256_of_file(parent / WEIGHTS) for parent in parents or [like]),
    }
    with folder_written_aside(folder) as aside:
        save_file(tensors, str(aside / WEIGHTS), metadata={"format": "pt"})
        sha256 = sha256_of_file(aside / WEIGHTS)
        write_json(aside / CONFIG, config)
        if identity is not None:
            lineage = {**identity.get("lineage", {}), **history}
            write_json(
                aside / IDENTITY, {**identity, "lineage": lineage, **file_digests(aside, tensors)}
            )
    return sha256


def _module_paths(tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Return the module paths in order; every key must be one factor of a pair."""
    letters: dict[str, set[str]] = {}
    for key in sorted(tensors):
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise AdapterError(
                f"{folder} holds {key}, which is no factor of a low-rank update; only plain LoRA of linear layers is read"
            )
        letters.setdefault(match[1], set()).add(match[2])
    for name, found in letters.items():
        if found != {"A", "B"}:
            raise AdapterError(
                f"{folder} holds lora_{found.pop()} of {name} alone; fetch or train the adapter again"
            )
    if not letters:
        raise AdapterError(f"{folder} holds no tensor; fetch or train the adapter again")
    return sorted(letters)


def _update(name: str, tensors: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> Update:
    a, b = (tensors[f"{PREFIX}{name}.lora_{letter}.weight"].float() for letter in "AB")
    try:
        return Update(a, b, _scale(name, a.shape[0], config))
    except AdapterError as error:
        raise AdapterError(f"{name} of {folder}: {error}") from error


def _scale(name: str, rank: int, config: LoraConfig) -> float:
    """Return the factor of one module's B·A."""
    if rank != config.rank_of(name):
        raise AdapterError(
            f"its rank is {rank} where the config says {config.rank_of(name)}; fetch or train the adapter again"
        )
    return config.scale_of(name)


def _same_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Compare the fingerprints of one kind of storage; where no kind is common to both, the names and revisions."""
    one, other = first.get("base_digests", {}), second.get("base_digests", {})
    kinds = one.keys() & other.keys()
    if kinds:
        return all(one[kind] == other[kind] for kind in kinds)
    return all(first.get(key) == second.get(key) for key in ("base", "revision"))


def _tensors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Return the factors under PEFT's keys, each in memory of its own, as safetensors demands."""
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": factor.detach()
        .to("cpu", torch.float32, copy=True)
        .contiguous()
        for name, update in updates.items()
        for letter, factor in (("A", update.a), ("B", update.b))
    }


def _peft_config(updates: Mapping[str, Update], like: Path) -> dict[str, Any]:
    """Return the settings of `like` with the ranks, scales and modules of `updates`."""
    read_config(like)
    values = read_json(like / CONFIG)
    widest = max(updates.values(), key=lambda update: update.rank)
    ranks = {name: update.rank for name, update in updates.items() if update.rank != widest.rank}
    alphas = {
        name: _alpha(update) for name, update in updates.items() if _alpha(update) != _alpha(widest)
    }
    if set(updates) != set(_module_paths(read_tensors(like), like)):
        values |= {
            "target_modules": sorted(updates),
            **{key: None for key in NARROWING if key in values},
        }
    return {
        **values,
        "r": widest.rank,
        "lora_alpha": _alpha(widest),
        "use_rslora": False,
        "rank_pattern": {pattern_for(name, updates): rank for name, rank in ranks.items()},
        "alpha_pattern": {pattern_for(name, updates): alpha for name, alpha in alphas.items()},
        "inference_mode": True,
    }


def _alpha(update: Update) -> float:
    alpha = update.scale * update.rank
    return int(alpha) if alpha.is_integer() else alpha
