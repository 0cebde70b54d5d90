"""What an adapter is, read from its files: type, base, targets, ranks, scales, sizes, anomalies."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lora_core.adapter.contents import AdapterContents, read_contents
from lora_core.export.conversion_formats import is_dora
from lora_core.inspection.anomalies import find_anomalies
from lora_core.inspection.damage import Anomaly
from lora_core.inspection.measuring import UpdateFacts, measure_updates


@dataclass(frozen=True)
class UpdateGroup:
    """The updates of one kind of module with the same shape, rank and scale."""

    kind: str
    """Last part of their paths, such as q_proj."""
    modules: int
    shape: tuple[int, int]
    """(out, in) of the updated weights."""
    rank: int
    alpha: float
    scale: float
    """The factor of B·A."""
    dtype: str
    mean_norm: float
    """Mean Frobenius norm of ΔW."""
    mean_effective_rank: float


@dataclass(frozen=True)
class AdapterReport:
    """What the files of an adapter show."""

    folder: str
    type: str
    """LoRA, rsLoRA, DoRA or rsLoRA + DoRA."""
    base: str
    """Name of the base that the files record; empty if they record none."""
    revision: str
    quantization: str
    """How the base was stored in training, such as nf4; empty if the files do not record it."""
    fingerprints: Mapping[str, str]
    """Kind of storage → digest of the base, from the sidecar."""
    targets: tuple[str, ...]
    """Kinds of modules with an update."""
    groups: tuple[UpdateGroup, ...]
    others: Mapping[str, int]
    """What else is trained → number of tensors, such as magnitudes or complete modules."""
    weights: int
    """Numbers in the file."""
    file_bytes: int
    anomalies: tuple[Anomaly, ...]


def inspect_adapter(folder: Path) -> AdapterReport:
    """Read an adapter's files, of PEFT or of this library, and report what they hold.

    Raises:
        AdapterError: they cannot be read, or are not those of one LoRA.
    """
    contents = read_contents(folder)
    facts = measure_updates(contents)
    identity = contents.identity or {}
    return AdapterReport(
        folder=str(folder),
        type=_type_of(contents),
        base=str(identity.get("base") or contents.values.get("base_model_name_or_path") or ""),
        revision=str(identity.get("revision") or contents.values.get("revision") or ""),
        quantization=_quantization(identity),
        fingerprints=dict(identity.get("base_digests", {})),
        targets=tuple(dict.fromkeys(_kind(name) for name in contents.factors)),
        groups=tuple(_groups(facts)),
        others=_others(contents),
        weights=sum(tensor.numel() for tensor in contents.tensors.values()),
        file_bytes=contents.file.stat().st_size,
        anomalies=find_anomalies(contents, facts),
    )


def _type_of(contents: AdapterContents) -> str:
    names = []
    if contents.scales.use_rslora:
        names.append("rsLoRA")
    if is_dora(contents):
        names.append("DoRA")
    return " + ".join(names) or "LoRA"


def _quantization(identity: Mapping[str, object]) -> str:
    """Return how the base was stored in training: from the lineage, or the kinds of digests."""
    lineage = identity.get("lineage")
    if isinstance(lineage, dict) and lineage.get("quantization"):
        return str(lineage["quantization"])
    digests = identity.get("base_digests")
    kinds = digests if isinstance(digests, dict) else {}
    return next((str(kind) for kind in kinds if not str(kind).startswith("dense")), "")


def _kind(module: str) -> str:
    return module.removesuffix(".base_layer").rpartition(".")[2]


def _groups(facts: Mapping[str, UpdateFacts]) -> Iterator[UpdateGroup]:
    """Yield the groups in the order of their first module."""
    members: dict[tuple[str, str], list[UpdateFacts]] = {}
    for name, each in facts.items():
        same = f"{each.shape} {each.rank} {each.scale} {each.dtype}"
        members.setdefault((_kind(name), same), []).append(each)
    for (kind, _), group in members.items():
        first = group[0]
        yield UpdateGroup(
            kind=kind,
            modules=len(group),
            shape=first.shape,
            rank=first.rank,
            alpha=first.alpha,
            scale=first.scale,
            dtype=first.dtype,
            mean_norm=fmean(each.norm for each in group),
            mean_effective_rank=fmean(each.effective_rank for each in group),
        )


def _others(contents: AdapterContents) -> dict[str, int]:
    """Return what else the file holds, by the last part of the keys."""
    counts: dict[str, int] = {}
    stacks = contents.factors.keys() - contents.layers.keys()
    if stacks:
        counts["updates of parameters"] = len(stacks)
    for key in contents.others:
        kind = _kind(key.removesuffix(".weight"))
        counts[kind] = counts.get(kind, 0) + 1
    return counts
