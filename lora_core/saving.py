"""Methods of transformers that an adapted model refuses or handles itself.

`save_pretrained` writes every weight under the name that it has in the model. Under an adapter
these are other names, and `from_pretrained` would replace the missing weights by random ones. The
adapted model therefore gets its own `save_pretrained`, which raises while an adapter is in the
model. Trainers and uploads call that method too. `resize_token_embeddings` and `tie_weights` expect
plain embeddings and heads, so they too are replaced while an adapter wraps one.

`state_dict` is not restricted: it holds the base's weights and the adapter's under the names that
they have in the adapted model, and restores a model with the same adapter. `load_state_dict` of a
plain model refuses these names.
"""

from functools import partial
from typing import Any

from torch import nn

from lora_core.base.sharing import FLAG, is_head_tied
from lora_core.errors import AdapterError
from lora_core.modules import adapter_parts, output_head, unwrapped

SAVE = "save_pretrained"
RESIZE = "resize_token_embeddings"
TIE = "tie_weights"


def guard_methods(model: nn.Module) -> None:
    """Give `model`, and each model inside it, methods that know of an adapter."""
    guards = {SAVE: _save_plain, RESIZE: _resize_plain, TIE: _tie_plain}
    for module in unwrapped(model).modules():
        for method, guard in guards.items():
            if hasattr(type(module), method):
                setattr(module, method, partial(guard, module))


def _save_plain(module: Any, *arguments: Any, **options: Any) -> Any:
    """Save `module` with the method of its class; raise AdapterError if it carries an adapter."""
    part = next(adapter_parts(module), None)
    if part is not None:
        raise AdapterError(
            f"the model carries an adapter, such as at {part[0]}, and {SAVE} would write names "
            "that no base model loads; save the adapter with lora_core.save_adapter, or merge it "
            f"with lora_core.merge first and then call {SAVE}"
        )
    return getattr(type(module), SAVE)(module, *arguments, **options)


def _resize_plain(module: Any, *arguments: Any, **options: Any) -> Any:
    """Resize the embeddings of `module`; raise AdapterError if the adapter wraps one."""
    wrapped = _wrapped_vocabulary(module)
    if wrapped is not None and (arguments or options):
        raise AdapterError(
            f"the adapter wraps {wrapped}, whose number of rows is fixed then; "
            f"call {RESIZE} before the adapter is injected or loaded"
        )
    return getattr(type(module), RESIZE)(module, *arguments, **options)


def _tie_plain(module: Any, *arguments: Any, **options: Any) -> Any:
    """Tie the weights of `module`.

    While the adapter wraps the embedding or the head, the weights of the base stay tied, so nothing
    is left to do.

    Raises:
        AdapterError: the base's weights were untied although its config ties them.
    """
    wrapped = _wrapped_vocabulary(module)
    if wrapped is None:
        return getattr(type(module), TIE)(module, *arguments, **options)
    if getattr(module.config, FLAG, False) and output_head(module) and not is_head_tied(module):
        raise AdapterError(
            f"the adapter wraps {wrapped}, and the head no longer shares the embedding's weight as "
            f"{FLAG}=True states; call {TIE} before the adapter is injected or loaded"
        )
    return None


def _wrapped_vocabulary(model: nn.Module) -> str | None:
    """Return the path of an embedding or output head that a part of the adapter replaces, if any.

    Names are those in `model`, which can be the inner model of another one.
    """
    head = output_head(model)
    for path, part in adapter_parts(model):
        base = getattr(part, "base", None)
        if isinstance(base, nn.Embedding) or (head is not None and base is head):
            return path
    return None
