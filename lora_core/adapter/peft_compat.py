"""What PEFT guesses from names, and how this library loads or refuses the result."""

import re
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.adapter.checks import path_ends_with
from lora_core.adapter.json_files import PREFIX
from lora_core.adapter.peft_config import CLASSIFIERS
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError
from lora_core.injection import Parts
from lora_core.layers.expert_layout import supports
from lora_core.layers.trained import TiedEmbedding, TrainedModule, TrainedRows
from lora_core.modules import adapter_parts, call_getter, output_head, plain_modules, unwrapped

ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Matches the key of an update of a single expert: transformers before 5 had no stacks."""
READ_AS_STACKS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"})
"""Names that PEFT 0.21 reads as the stacks of experts or their router, not as linear layers.

It does so on a model with stacks of experts, because older adapters use these names; only
qwen2_moe is exempt. Dense layers of these names then cannot be named to PEFT at all.
"""


def warn_of_misread_names(model: nn.Module, names: list[str]) -> None:
    """Warn if PEFT would put the adapter on other weights than it was trained on."""
    misread = [name for name in names if name.rpartition(".")[2] in READ_AS_STACKS]
    if not misread or not _has_stacks(model):
        return
    config = getattr(unwrapped(model), "config", None)
    if getattr(config, "model_type", None) == "qwen2_moe":
        return
    warnings.warn(
        f"PEFT takes {misread[0]} to mean the model's stacks of experts and would load this "
        "adapter incorrectly, with a warning about missing keys; load it with lora_core, merge it "
        f"for other programs, or leave {', '.join(sorted(READ_AS_STACKS))} out of the targets",
        stacklevel=3,
    )


def warn_of_shared_embedding(model: nn.Module) -> None:
    """Warn if PEFT would apply what an embedding trains to fewer modules than this library."""
    narrower = _narrower_in_peft(model, dict(adapter_parts(model)))
    if narrower is not None:
        warnings.warn(
            f"PEFT applies what is trained of a shared embedding to one module and not to "
            f"{narrower}, so its outputs differ; load the adapter with lora_core, merge it for "
            "other programs, or name the embeddings of encoder and decoder as targets",
            stacklevel=3,
        )


def refuse_rows_of_one_user(model: nn.Module, parts: Parts, folder: Path) -> None:
    """Refuse PEFT's rows of an embedding that shares its weight, which PEFT trained for it alone.

    Raises:
        AdapterError: this library would use the rows in the other users of the weight too.
    """
    narrower = _narrower_in_peft(model, parts)
    if narrower is not None:
        raise AdapterError(
            f"{folder} has an embedding that PEFT trained for one user of a shared weight, and "
            f"here {narrower} would use it too; merge the adapter with PEFT, or train it on the "
            "embedding that get_input_embeddings returns"
        )


def _narrower_in_peft(model: nn.Module, parts: Parts) -> str | None:
    """Return a module that uses another embedding's training here and not in PEFT, if any.

    PEFT shares only trained rows, and only those of the model's input embedding.
    """
    found = call_getter(unwrapped(model), "get_input_embeddings")
    source = getattr(found, "base", found)
    for path, part in parts.items():
        if isinstance(part, TiedEmbedding):
            is_shared = isinstance(part.embedding, TrainedRows) and part.embedding.base is source
            if not is_shared:
                return path
    return None


def refuse_single_experts(tensors: dict[str, Tensor], model: nn.Module, folder: Path) -> None:
    """Refuse an adapter with an update per expert if the model stores its experts in stacks."""
    single = [key for key in tensors if ONE_EXPERT.search(key)]
    if single and _has_stacks(model):
        raise AdapterError(
            f"{folder} has a separate update for each expert, such as {min(single)}, but this "
            "model stores its experts in stacks; load the adapter on this model with PEFT, which "
            "combines such updates, save it there, and load the result"
        )


def _has_stacks(model: nn.Module) -> bool:
    return any(supports(module) for module in plain_modules(model).values())


def without_guessed_heads(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Remove from modules_to_save the classifier heads that PEFT names but the model lacks."""
    if not set(CLASSIFIERS) <= set(config.modules_to_save):
        return config
    absent = set(CLASSIFIERS)
    for path in plain_modules(model):
        absent -= {name for name in CLASSIFIERS if path_ends_with(path, [name])}
    if absent == set(CLASSIFIERS):
        return config
    kept = tuple(name for name in config.modules_to_save if name not in absent)
    return replace(config, modules_to_save=kept)


def refuse_other_vocabulary(tensors: dict[str, Tensor], model: nn.Module, folder: Path) -> None:
    """Refuse complete embeddings or heads for another number of tokens than the model has.

    Raises:
        AdapterError: the numbers differ.
    """
    for path in vocabulary_modules(model):
        own: Tensor = plain_modules(model)[path].weight  # type: ignore[assignment]
        for suffix in (".weight", ".base_layer.weight"):
            saved = tensors.get(f"{PREFIX}{path}{suffix}")
            if saved is not None and saved.dim() == 2 and saved.shape[0] != own.shape[0]:
                raise AdapterError(
                    f"{folder} holds {path} with {saved.shape[0]} rows, but this model has "
                    f"{own.shape[0]}: it was trained with another number of tokens; "
                    f"call model.resize_token_embeddings({saved.shape[0]}) before loading"
                )


def vocabulary_modules(model: nn.Module) -> list[str]:
    """Return the paths of the embeddings and of the output head that store a weight."""
    head = output_head(unwrapped(model))
    paths: list[str] = []
    for path, module in plain_modules(model).items():
        is_head = head is not None and module is head
        is_stored = module._parameters.get("weight") is not None
        if is_stored and (isinstance(module, nn.Embedding) or is_head):
            paths.append(path)
    return paths


def without_base_copies(
    tensors: dict[str, Tensor], parts: Parts, folder: Path
) -> dict[str, Tensor]:
    """Remove the base's weight and bias, which PEFT saves with an adapted embedding or head.

    Raises:
        AdapterError: one of them differs from the model's.
    """
    kept = dict(tensors)
    for name, part in parts.items():
        trained: Collection[str] = part.adapter_tensors()  # type: ignore[operator]
        for own_name in ("weight", "bias"):
            key = f"base_layer.{own_name}"
            if key in trained:
                continue
            copy = kept.pop(f"{PREFIX}{name}.{key}", None)
            own = getattr(part.base, own_name, None)
            if copy is not None and not _is_copy(copy, own):
                raise AdapterError(
                    f"{folder} has a base {own_name} of {name} that differs from this model's; "
                    "load it on the base it was trained on"
                )
    return kept


def tied_copies(parts: Parts) -> dict[str, str]:
    """Return the keys under which PEFT saves a tensor again, each with the key that it has here.

    A module can have one parameter under several names, as BERT's head has its bias.
    """
    copies: dict[str, str] = {}
    for path, part in parts.items():
        if isinstance(part, TrainedModule):
            for other, name in part.tied_names().items():
                copies[f"{PREFIX}{path}.{other}"] = f"{PREFIX}{path}.{name}"
    return copies


def without_tied_copies(
    tensors: dict[str, Tensor], parts: Parts, folder: Path
) -> dict[str, Tensor]:
    """Remove the copies of tensors that a module has under several names.

    Raises:
        AdapterError: a copy differs from its tensor.
    """
    kept = dict(tensors)
    for other, key in tied_copies(parts).items():
        copy = kept.pop(other, None)
        if copy is not None and key in kept and not torch.equal(copy, kept[key]):
            raise AdapterError(
                f"{folder} has different values for {other} and {key}, which are one tensor in "
                "this model; load it on the base it was trained on"
            )
    return kept


def _is_copy(copy: Tensor, own: object) -> bool:
    return isinstance(own, Tensor) and torch.equal(copy.to(own.dtype), own.cpu())
