"""How transformers renamed the weights of a model between its versions.

transformers reads checkpoints from before a change by an ordered list of renamings. Adapters name
the same modules, so they are read by the same list, in both directions.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lora_core.base.weight_files import open_checkpoint

Rename = Callable[[str], str]


def weight_renames(model: PreTrainedModel) -> tuple[Rename, Rename]:
    """Return functions from former to present names of weights, and from present to former ones.

    Fused and transposed weights are not renamed here: their adapters have other shapes.

    Args:
        model: without wrappers; only its class and config are read.
    """
    renamings = [
        one
        for one in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(one, WeightRenaming)
    ]
    reverse = [one.reverse_transform() for one in reversed(renamings)]
    return partial(_renamed, renamings, False), partial(_renamed, reverse, True)


def checkpoint_renames(folder: Path) -> tuple[Rename, ...]:
    """Return `weight_renames` of the model that a folder holds, without loading its weights.

    There are none for a model whose class transformers does not have or cannot build here.

    Args:
        folder: with config.json and the weights.

    Raises:
        CheckpointError: the folder holds no complete checkpoint.
    """
    names = open_checkpoint(folder).config.get("architectures") or [""]
    model_class = getattr(transformers, str(names[0]), None)
    if model_class is None:
        return ()
    try:
        config = model_class.config_class.from_pretrained(folder)
        with torch.device("meta"):
            model = model_class(config)
    except Exception:  # noqa: BLE001 - of any kind; the names in the files must then be the modules'
        return ()
    return weight_renames(model)


def _renamed(renamings: list[Any], is_reverse: bool, name: str) -> str:
    renamed, _ = rename_source_key(name, renamings, [], reverse=is_reverse)
    return renamed
