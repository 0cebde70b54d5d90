"""How a merge on disk treats an output head that is tied to the embedding.

The base's files hold one tensor for both; an adapter over one of the two changes only that one. The
result then holds both tensors, and its config.json declares them untied, as after a merge in memory
and a save.

Only the heads of decoders are recognized, by their names. For a checkpoint that may tie weights in
another way, the merge raises an error instead of guessing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_core.base.weight_files import HEADS, Checkpoint, module_name
from lora_core.errors import MergeError
from lora_core.spectrum.updates import Update

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
"""Names that language models give to the embedding that a head can be tied to."""
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "ForConditionalGeneration")
WITHOUT_HEAD = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
"""Class name endings of models with an output head over the vocabulary, and of those without."""
MERGE_IN_MEMORY = "merge it in memory and save the model"


@dataclass(frozen=True)
class Untying:
    """What the result needs if an adapter unties the head from the embedding."""

    copies: Mapping[str, str]
    """Tensor that the files lack → the tensor that it is a copy of."""
    is_declared: bool = False
    """Whether config.json must declare that no weights are tied."""

    def updated_config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json that the result needs.

        Args:
            values: the base's config.json; not changed.
        """
        updated = dict(values)
        if not self.is_declared:
            return updated
        text = values.get("text_config")
        if isinstance(text, dict):
            updated["text_config"] = {**text, "tie_word_embeddings": False}
        updated["tie_word_embeddings"] = False
        return updated


def plan_untying(checkpoint: Checkpoint, updates: Mapping[str, Update]) -> Untying:
    """Return how the adapter changes the tie between head and embedding.

    It changes nothing if it targets neither of the two, or if they are not tied.

    Args:
        checkpoint: the base.
        updates: module path → update; those of embeddings are marked.

    Raises:
        MergeError: the checkpoint may tie weights in a way that is not recognized.
    """
    heads = [module for module in updates if module_name(module) in HEADS]
    embeddings = [module for module, update in updates.items() if update.embedding]
    if not _is_tied(checkpoint) or not (heads or embeddings):
        return Untying({})
    embedding = _tied_embedding(checkpoint)
    if not (heads or _changes_a_tie(checkpoint, embeddings, embedding)):
        return Untying({})
    copies = {}
    if not checkpoint.stored_head:
        head = heads[0] if heads else ""
        head_tensor = _head_tensor(checkpoint, head)
        copies[head_tensor] = embedding
    return Untying(copies, is_declared=True)


def _changes_a_tie(checkpoint: Checkpoint, modules: list[str], embedding: str) -> bool:
    """Return whether one of the adapted `modules` owns the tensor `embedding` next to a head."""
    changed = [module for module in modules if _is_of(module, embedding)]
    return bool(changed) and _has_head(checkpoint, changed[0], embedding)


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Return whether the head is tied; without a flag, it is if the files have no head."""
    if checkpoint.head_is_tied is not None:
        return checkpoint.head_is_tied
    return checkpoint.stored_head is None


def _tied_embedding(checkpoint: Checkpoint) -> str:
    """Return the tensor that the head is tied to."""
    found = []
    has_unknown_head = False
    for name in checkpoint.entries:
        has_unknown_head |= _is_unknown_head(name)
        if name.endswith(".weight") and module_name(name) in EMBEDDINGS:
            found.append(name)
    is_decoder = not checkpoint.config.get("is_encoder_decoder")
    is_known = len(found) == 1 and is_decoder and not has_unknown_head
    if not is_known:
        raise MergeError(
            f"{checkpoint.folder} may tie its output head to an embedding, "
            f"and which tensors these are is not known "
            f"(embeddings: {', '.join(found) or 'none'}); {MERGE_IN_MEMORY}"
        )
    return found[0]


def _is_unknown_head(tensor: str) -> bool:
    """Return whether a tensor belongs to a head other than a plain `lm_head`."""
    is_head = tensor.startswith(("cls.", "lm_head."))
    return is_head and tensor not in ("lm_head.weight", "lm_head.bias")


def _has_head(checkpoint: Checkpoint, module: str, embedding: str) -> bool:
    """Return whether the model that the adapter was trained on has an output head."""
    if f"{module}.weight" != embedding:
        return True  # the files are of a model without a head, and the adapter's paths are not
    names = checkpoint.config.get("architectures") or ["ForCausalLM"]
    if str(names[0]).endswith(WITH_HEAD):
        return True
    if str(names[0]).endswith(WITHOUT_HEAD):
        return False
    raise MergeError(
        f"{checkpoint.folder} holds a {names[0]}, whose output head may be tied to {module}; "
        f"{MERGE_IN_MEMORY}"
    )


def _head_tensor(checkpoint: Checkpoint, module: str) -> str:
    """Return the file's name for the weight of the head at the path `module`.

    An empty path means the head of the model itself. GPT-NeoX renames its modules in files.
    """
    inside, dot, _ = module.rpartition(".")
    is_neox = checkpoint.config.get("model_type") == "gpt_neox"
    head = "embed_out" if is_neox else "lm_head"
    return f"{inside}{dot}{head}.weight"


def _is_of(module: str, tensor: str) -> bool:
    """Return whether `tensor` is the weight of `module`, by the names of the files.

    In a checkpoint of the model without its head, names lack the first part of the path.
    """
    without_first_part = module.partition(".")[2]
    return tensor in (f"{module}.weight", f"{without_first_part}.weight")
