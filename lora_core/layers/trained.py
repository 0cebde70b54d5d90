"""What an adapter trains besides low-rank updates: whole modules, single rows of an embedding, biases.

Each stands in the model over the frozen module and holds weights of its own, so the base keeps its bits: what it trains
is taken away by taking it out of the model.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from lora_core.base.quant import quantised_kind
from lora_core.errors import TargetError
from lora_core.layers.embedding import check_table, factor_of


class TrainedModule(nn.Module):
    """A module that is trained whole, as a copy of the base's (PEFT's modules_to_save)."""

    def __init__(self, base: nn.Module, name: str) -> None:
        """Copy `base`; raises TargetError where it has no weights that could be trained."""
        super().__init__()
        if any(quantised_kind(module) for module in base.modules()):
            raise TargetError(
                f"modules_to_save names {name}, which is quantised and cannot be trained; leave it out or load it dense"
            )
        if not any(True for _ in base.parameters()):
            raise TargetError(
                f"modules_to_save names {name}, which has no weights to train; leave it out"
            )
        if any(
            isinstance(module, _NormBase) and module.track_running_stats
            for module in base.modules()
        ):
            raise TargetError(
                f"modules_to_save names {name}, whose running statistics no adapter's file holds; leave their layers out"
            )
        self.base = base
        self.trained = deepcopy(base)
        self.trained.requires_grad_(True)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the trained copy computes."""
        return self.trained(*arguments, **options)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """What is trained and saved, under the names it has in the module."""
        return dict(self.trained.named_parameters())

    def merged_tensors(self) -> dict[str, Tensor]:
        """The base's parameters with the training in them."""
        return dict(self.trained.named_parameters())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("trained"), name)  # a head is asked for its weight


class TrainedRows(nn.Module):
    """An embedding of which some rows are trained, such as those of new special tokens.

    Attributes:
        rows: (n,), their numbers.
        trainable_tokens_delta: (n, D), the rows themselves (PEFT's name; it holds no differences), in float32 at least.
    """

    rows: Tensor
    order: Tensor
    sorted_rows: Tensor

    def __init__(self, base: nn.Module, name: str, rows: tuple[int, ...]) -> None:
        """Copy the rows of `base`; raises TargetError where it is no embedding, more than a table, or has no such row."""
        super().__init__()
        if not isinstance(base, nn.Embedding):
            raise TargetError(
                f"trainable_token_indices names {name}, a {type(base).__name__}; name an embedding"
            )
        check_table(base, name)
        if max(rows) >= base.num_embeddings:
            raise TargetError(
                f"trainable_token_indices names row {max(rows)} of {name}, which has {base.num_embeddings}; resize it first"
            )
        self.base = base
        numbers = torch.tensor(rows, device=base.weight.device)
        self.register_buffer("rows", numbers, persistent=False)
        self.register_buffer("order", numbers.argsort(), persistent=False)
        self.register_buffer("sorted_rows", numbers.sort().values, persistent=False)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.trainable_tokens_delta = nn.Parameter(
            base.weight.detach()[numbers].to(dtype, copy=True)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Map (…) of row numbers to (…, D)."""
        y: Tensor = self.base(ids)
        place = torch.searchsorted(self.sorted_rows, ids).clamp(max=len(self.rows) - 1)
        trained = self.trainable_tokens_delta[self.order[place]].to(y.dtype) * factor_of(
            self._base()
        )
        return torch.where((self.sorted_rows[place] == ids)[..., None], trained, y)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """What is trained and saved, under PEFT's name after the module's path."""
        return {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta}

    def merged_tensors(self) -> dict[str, Tensor]:
        """The base's table with the trained rows in it."""
        return {"weight": self.weight.detach()}

    @property
    def weight(self) -> Tensor:
        """The whole table (V, D), through which the trained rows get their gradient."""
        weight = self._base().weight
        return weight.index_copy(0, self.rows, self.trainable_tokens_delta.to(weight.dtype))

    def change(self) -> Tensor:
        """Return by how much the rows differ from the base's, (n, D) in float32: nothing, at the start."""
        return self.trainable_tokens_delta - self._base().weight.detach()[self.rows]

    def _base(self) -> nn.Embedding:
        assert isinstance(self.base, nn.Embedding)
        return self.base


class TiedHead(nn.Module):
    """An output head whose weight is the embedding's: its trained rows are those of the embedding."""

    def __init__(self, base: nn.Module, rows: TrainedRows) -> None:
        super().__init__()
        self.base = base
        self._rows = (rows,)  # in a tuple, since the rows belong to the embedding alone

    @property
    def embedding(self) -> TrainedRows:
        """The embedding that is followed."""
        return self._rows[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, V) logits."""
        y: Tensor = self.base(x)
        change = x @ self.embedding.change().to(x.dtype).T
        return y.index_add(-1, self.embedding.rows, change.to(y.dtype))

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Nothing: the embedding saves the rows."""
        return {}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Nothing: the weight is the embedding's."""
        return {}

    @property
    def weight(self) -> Tensor:
        """The whole weight (V, D), as the embedding has it."""
        return self.embedding.weight


class TrainedBias(nn.Module):
    """A module that is no target and whose bias is trained."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        bias: Tensor = base.bias  # type: ignore[assignment]
        self.base = base
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the base computes with the trained bias."""
        return functional_call(self.base, {"bias": self.bias}, arguments, options)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """What is trained and saved, under PEFT's name after the module's path."""
        return {"bias": self.bias}

    def merged_tensors(self) -> dict[str, Tensor]:
        """The base's bias with the training in it."""
        return {"bias": self.bias}

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight
