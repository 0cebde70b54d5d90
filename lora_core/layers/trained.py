"""What an adapter trains in addition to low-rank updates: modules, embedding rows, biases.

Each part replaces a frozen module in the model and holds its own weights, so the base keeps its
bits: removing the part from the model removes what it trained.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from lora_core.base.quant import execution_device, has_custom_forward, loaded, quantized_kind
from lora_core.coverage import PERMANENT, computed_tensors, refuse_computed
from lora_core.errors import TargetError
from lora_core.layers.embedding import LoraEmbedding, check_table, factor_of
from lora_core.modules import base_attribute, clear_hooks, hook_containers

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
"""Modules that a model indexes instead of calling them."""


class TrainedModule(nn.Module):
    """A module that is trained in full, as a copy of the base's (PEFT's modules_to_save)."""

    def __init__(self, base: nn.Module, name: str) -> None:
        """Copy `base`; raise TargetError if it has no weights that can be trained."""
        super().__init__()
        objection = _objection_to_training(base)
        if objection is not None:
            raise TargetError(f"modules_to_save names {name}, {objection}")
        self.base = base
        # Hooks of inner modules run for the copy too, so it shares their containers. Those of
        # `base` itself move to this module when it takes the place of `base`.
        shared = {id(container): container for container in hook_containers(base)}
        self.trained = deepcopy(base, shared)
        clear_hooks(self.trained)
        self.trained.requires_grad_(True)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the trained copy computes."""
        return self.trained(*arguments, **options)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return what is trained and saved, under the names it has in the module."""
        return dict(self.trained.named_parameters())

    def tied_names(self) -> dict[str, str]:
        """Return the other names of parameters that have several, each with the first name."""
        first = {id(parameter): name for name, parameter in self.trained.named_parameters()}
        named = self.trained.named_parameters(remove_duplicate=False)
        return {name: first[id(one)] for name, one in named if first[id(one)] != name}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the trained copy's parameters."""
        return dict(self.trained.named_parameters())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("trained"), name)  # models read a head's weight


class TrainedRows(nn.Module):
    """An embedding with some trained rows, such as those of new special tokens.

    Attributes:
        rows: (n,), their numbers.
        trainable_tokens_delta: (n, D), the rows themselves, in float32 or wider. The name is
            PEFT's; it does not hold differences.
    """

    rows: Tensor
    order: Tensor
    sorted_rows: Tensor

    def __init__(self, base: nn.Module, name: str, rows: tuple[int, ...]) -> None:
        """Copy the rows of `base`; raise TargetError if it is not a plain table with these rows."""
        super().__init__()
        if not isinstance(base, nn.Embedding):
            raise TargetError(
                f"trainable_token_indices names {name}, a {type(base).__name__}; name an embedding"
            )
        check_table(base, name)
        setting = "trainable_token_indices"
        refuse_computed(base, name, tensor="weight", setting=setting)
        if max(rows) >= base.num_embeddings:
            raise TargetError(
                f"trainable_token_indices names row {max(rows)} of {name}, "
                f"which has {base.num_embeddings}; resize it first"
            )
        self.base = base
        indices = torch.tensor(rows, device=execution_device(base))
        self.register_buffer("rows", indices, persistent=False)
        self.register_buffer("order", indices.argsort(), persistent=False)
        self.register_buffer("sorted_rows", indices.sort().values, persistent=False)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        initial = loaded(base.weight, base).detach()[indices].to(dtype, copy=True)
        self.trainable_tokens_delta = nn.Parameter(initial)

    def forward(self, input: Tensor) -> Tensor:
        """Map (…) of row numbers to (…, D)."""
        return self.updated(self.base(input), input, self._base())

    def updated(self, y: Tensor, ids: Tensor, table: nn.Embedding) -> Tensor:
        """Replace what `table` computed for trained rows.

        Args:
            y: (…, D), the output of `table`, which has the base's weight.
            ids: (…), the row numbers.
            table: an embedding, whose factor also applies to the trained rows.
        """
        ids = ids.to(y.device).contiguous()  # an offloaded base computes on another device
        index = torch.searchsorted(self.sorted_rows, ids).clamp(max=len(self.rows) - 1)
        trained = self.trainable_tokens_delta[self.order[index]].to(y.dtype)
        trained = trained * factor_of(table)
        is_trained = self.sorted_rows[index] == ids
        return torch.where(is_trained[..., None], trained, y)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return what is trained and saved, under PEFT's name relative to the module's path."""
        return {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the base's table with the trained rows in it."""
        return {"weight": self.weight.detach()}

    @property
    def weight(self) -> Tensor:
        """The full table (V, D), through which the trained rows get their gradient."""
        weight = self._base().weight
        return weight.index_copy(0, self.rows, self.trainable_tokens_delta.to(weight.dtype))

    def change(self) -> Tensor:
        """Return the trained rows minus the base's, (n, D) in float32; zero before training."""
        weight = loaded(self._base().weight, self._base())
        return self.trainable_tokens_delta - weight.detach()[self.rows]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return base_attribute(self, name)

    def _base(self) -> nn.Embedding:
        assert isinstance(self.base, nn.Embedding)
        return self.base


class TiedEmbedding(nn.Module):
    """Another embedding with the same weight, which uses what the first one trains.

    Encoder-decoder models have one for the encoder, one for the decoder, and one that only holds
    the weight.
    """

    def __init__(self, base: nn.Embedding, name: str, owner: TrainedRows | LoraEmbedding) -> None:
        """Use `owner` in `base`; raise TargetError if `base` is not a plain table."""
        super().__init__()
        check_table(base, name)
        self.base = base
        self._owner = (owner,)  # a tuple hides the module: its weights belong to one path alone

    @property
    def embedding(self) -> TrainedRows | LoraEmbedding:
        """The embedding that trains."""
        return self._owner[0]

    def forward(self, input: Tensor) -> Tensor:
        """Map (…) of row numbers to (…, D)."""
        assert isinstance(self.base, nn.Embedding)
        return self.embedding.updated(self.base(input), input, self.base)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return nothing: the other embedding saves what it trains."""
        return {}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return nothing: the weight is the other embedding's."""
        return {}

    @property
    def weight(self) -> Tensor:
        """The full table (V, D), shared with the other embedding."""
        return self.embedding.weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return base_attribute(self, name)


class TiedHead(nn.Module):
    """An output head that shares the embedding's weight, and so the embedding's trained rows."""

    def __init__(self, base: nn.Module, rows: TrainedRows) -> None:
        super().__init__()
        self.base = base
        self._rows = (rows,)  # a tuple hides the module: the rows belong to the embedding alone

    @property
    def embedding(self) -> TrainedRows:
        """The embedding whose rows the head uses."""
        return self._rows[0]

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, D) to (…, V) logits."""
        y: Tensor = self.base(input)
        change = input @ self.embedding.change().to(input.dtype).T
        return y.index_add(-1, self.embedding.rows, change.to(y.dtype))

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return nothing: the embedding saves the rows."""
        return {}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return nothing: the weight is the embedding's."""
        return {}

    @property
    def weight(self) -> Tensor:
        """The full weight (V, D), shared with the embedding."""
        return self.embedding.weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return base_attribute(self, name)


class TrainedBias(nn.Module):
    """A module that is not a target and whose bias is trained."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        bias: Tensor = base.bias  # type: ignore[assignment]
        self.base = base
        self.bias = nn.Parameter(loaded(bias, base).detach().clone())

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the base computes with the trained bias."""
        return functional_call(self.base, {"bias": self.bias}, arguments, options)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return what is trained and saved, under PEFT's name relative to the module's path."""
        return {"bias": self.bias}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the trained bias."""
        return {"bias": self.bias}

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return base_attribute(self, name)


def _objection_to_training(module: nn.Module) -> str | None:
    """Return why `module` cannot be trained in full and what to do instead, or None if it can."""
    if isinstance(module, CONTAINERS):
        return (
            f"a {type(module).__name__}, which the model indexes instead of calling it; name the "
            "modules in it, or leave it out"
        )
    modules = list(module.modules())
    if any(quantized_kind(inner) for inner in modules):
        return "which is quantized and cannot be trained; leave it out or load it dense"
    for inner in modules:
        is_offloaded = any(value.is_meta for value in inner.parameters(recurse=False))
        is_placed = hasattr(inner, "_hf_hook")  # accelerate's forward can be copied, others cannot
        if has_custom_forward(inner) and (is_offloaded or not is_placed):
            return (
                "whose forward was replaced on the instance, as offloading does, so a copy would "
                "compute with the original; leave it out or load it without offloading"
            )
        if computed_tensors(inner):
            return f"in which {computed_tensors(inner)[0]} is computed at every call; {PERMANENT}"
    if not list(module.parameters()):
        return "which has no weights to train; leave it out"
    if any(isinstance(inner, _NormBase) and inner.track_running_stats for inner in modules):
        return "whose running statistics no adapter file stores; leave their layers out"
    return None
