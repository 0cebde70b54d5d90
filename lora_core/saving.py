"""Stop an adapted model from being saved as if it were a plain one.

`save_pretrained` of transformers writes every weight under the name that it has in the model. Under
an adapter these are other names, and `from_pretrained` would replace the missing weights by random
ones. The adapted model therefore gets its own `save_pretrained`, which raises while an adapter is
in the model. Trainers and uploads call that method too.

`state_dict` is not restricted: it holds the base's weights and the adapter's under the names that
they have in the adapted model, and restores a model with the same adapter. `load_state_dict` of a
plain model refuses these names.
"""

from functools import partial
from typing import Any

from torch import nn

from lora_core.errors import AdapterError
from lora_core.modules import adapter_parts, unwrapped

METHOD = "save_pretrained"


def guard_saving(model: nn.Module) -> None:
    """Give `model`, and each model inside it, a `save_pretrained` that refuses an adapter."""
    for module in unwrapped(model).modules():
        if hasattr(type(module), METHOD):
            setattr(module, METHOD, partial(_save_plain, module))


def _save_plain(module: Any, *arguments: Any, **options: Any) -> Any:
    """Save `module` with the method of its class; raise AdapterError if it carries an adapter."""
    part = next(adapter_parts(module), None)
    if part is not None:
        raise AdapterError(
            f"the model carries an adapter, such as at {part[0]}, and {METHOD} would write names "
            "that no base model loads; save the adapter with lora_core.save_adapter, or merge it "
            f"with lora_core.merge first and then call {METHOD}"
        )
    return getattr(type(module), METHOD)(module, *arguments, **options)
