"""Tables of a plan: the base's weights by kind, and an adapter's targets by kind."""

import re

from torch import nn

from lora_core import Target
from lora_core.base.quant import base_weight
from lora_core.modules import output_head
from pipelines.runtime.interfaces.plan_result import StoredWeights, TargetKind


def stored_weights(
    model: nn.Module, targets: list[Target], *, quantized: bool
) -> tuple[StoredWeights, ...]:
    """Return all weights of the base by kind: how each is stored, and whether it is adapted.

    A kind is the name of a weight without the number of its layer. A tied weight is counted under
    its first name.

    Args:
        model: without weights.
        targets: the adapters'.
        quantized: whether linear layers are stored in NF4, except the output head.
    """
    head = output_head(model)
    target_names = {target.name for target in targets}
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    sizes: dict[tuple[str, str, bool], list[int]] = {}
    for path, module in model.named_modules():
        is_base_layer = module is not head and base_weight(module) is not None
        in_nf4 = quantized and is_base_layer
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}"
            if first_names[id(parameter)] != full_name:
                continue
            is_weight = name == "weight"
            stored = "nf4" if in_nf4 and is_weight else "dense"
            is_adapted = (path in target_names and is_weight) or full_name in target_names
            kind = re.sub(r"\.\d+\.", ".*.", full_name)
            numbers = sizes.setdefault((kind, stored, is_adapted), [])
            numbers.append(parameter.numel())
    return tuple(
        StoredWeights(
            name=kind, stored=stored, adapted=adapted, count=len(numbers), weights=sum(numbers)
        )
        for (kind, stored, adapted), numbers in sizes.items()
    )


def targets_by_kind(targets: list[Target], *, use_dora: bool) -> list[TargetKind]:
    """Group targets by the last part of their name and their shape.

    The weights are those of the group, with DoRA's magnitudes.

    Args:
        targets: of one adapter.
        use_dora: each target also trains a magnitude for each output.
    """
    groups: dict[tuple[str, int, int], list[Target]] = {}
    for target in targets:
        name = target.name.rpartition(".")[2]
        shape = (target.out_features, target.in_features)
        groups.setdefault((name, *shape), []).append(target)
    kinds = []
    for (name, out_features, in_features), group in groups.items():
        trained_weights = sum(target.trained_weights for target in group)
        if use_dora:
            trained_weights += out_features * len(group)
        kind = TargetKind(
            name=name,
            out_features=out_features,
            in_features=in_features,
            count=len(group),
            rank=group[0].rank,
            scale=group[0].scale,
            trained_weights=trained_weights,
        )
        kinds.append(kind)
    return kinds
