"""What a merge on disk does with an output head that is the embedding: one tensor in the files, two in the result.

An adapter over one of the two changes what that one computes. So its result holds both, and its config.json says that
they are no longer tied, as a merge in memory and a save leave them.

Only the heads of decoders are told by their names here; of a checkpoint that may tie in another way, nothing is guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_core.base.weight_files import HEADS, Checkpoint, module_name
from lora_core.errors import MergeError
from lora_core.spectrum.updates import Update

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
"""What language models call the embedding that a head can be tied to."""
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "ForConditionalGeneration")
WITHOUT_HEAD = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
"""How the classes are called that have an output head over the vocabulary, and those that have none."""
MERGE_IN_MEMORY = "merge it in memory and save the model"


@dataclass(frozen=True)
class Parting:
    """What has to be written where an adapter parts the head from the embedding."""

    copies: Mapping[str, str]
    """Tensor that the files lack → the one that it starts as."""
    is_told: bool = False
    """Whether config.json has to say that nothing is tied."""

    def config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json as the result needs it."""
        if not self.is_told:
            return dict(values)
        text = values.get("text_config")
        nested = (
            {"text_config": {**text, "tie_word_embeddings": False}}
            if isinstance(text, dict)
            else {}
        )
        return {**values, **nested, "tie_word_embeddings": False}


def parting(checkpoint: Checkpoint, updates: Mapping[str, Update]) -> Parting:
    """Return what the adapter does to the tie of head and embedding; nothing where it touches neither, or they are not tied.

    Raises:
        MergeError: the checkpoint may tie weights in a way that is not known here.
    """
    head = next((module for module in updates if module_name(module) in HEADS), None)
    tied = (
        checkpoint.head_is_tied
        if checkpoint.head_is_tied is not None
        else checkpoint.stored_head is None
    )
    if not tied or not (head or any(update.embedding for update in updates.values())):
        return Parting({})
    embedding = _embedding(checkpoint)
    parted = [
        module
        for module, update in updates.items()
        if update.embedding and _is_of(module, embedding)
    ]
    if not (head or (parted and _has_head(checkpoint, parted[0], embedding))):
        return Parting({})
    return Parting(
        {} if checkpoint.stored_head else {_head_tensor(checkpoint, head or ""): embedding},
        is_told=True,
    )


def _embedding(checkpoint: Checkpoint) -> str:
    """Return the tensor that the head is tied to."""
    found = [
        name
        for name in checkpoint.entries
        if name.endswith(".weight") and module_name(name) in EMBEDDINGS
    ]
    strange = [
        name
        for name in checkpoint.entries
        if name.startswith(("cls.", "lm_head.")) and name not in ("lm_head.weight", "lm_head.bias")
    ]
    if len(found) != 1 or strange or checkpoint.config.get("is_encoder_decoder"):
        raise MergeError(
            f"{checkpoint.folder} may tie its output head to an embedding, and which tensors these are is not known "
            f"(embeddings: {', '.join(found) or 'none'}); {MERGE_IN_MEMORY}"
        )
    return found[0]


def _has_head(checkpoint: Checkpoint, module: str, embedding: str) -> bool:
    """Tell whether the model that the adapter was trained on had an output head."""
    if f"{module}.weight" != embedding:
        return True  # the files are those of a model without one, and the adapter's paths are not
    names = checkpoint.config.get("architectures") or ["ForCausalLM"]
    if str(names[0]).endswith(WITH_HEAD):
        return True
    if str(names[0]).endswith(WITHOUT_HEAD):
        return False
    raise MergeError(
        f"{checkpoint.folder} holds a {names[0]}, whose output head may be tied to {module}; {MERGE_IN_MEMORY}"
    )


def _head_tensor(checkpoint: Checkpoint, module: str) -> str:
    """Return how files call the weight of the head at the path `module`, or of a model's own; GPT-NeoX's modules are renamed in files."""
    inside, dot, _ = module.rpartition(".")
    return f"{inside}{dot}{'embed_out' if checkpoint.config.get('model_type') == 'gpt_neox' else 'lm_head'}.weight"


def _is_of(module: str, tensor: str) -> bool:
    return tensor in (f"{module}.weight", f"{module.partition('.')[2]}.weight")
