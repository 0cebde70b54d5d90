"""LoraEmbedding: an embedding table with a low-rank update, y = W0[ids] + s · A[:, ids]ᵀ Bᵀ.

The table is the transpose of a linear weight: it is stored as (V, D), so its update is ΔW = s · B A
with A (R, V) and B (D, R). As in PEFT, A is initialized to zero and B is drawn.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.base.quant import execution_device, loaded
from lora_core.config import LoraConfig
from lora_core.errors import TargetError
from lora_core.init.random import generator_for
from lora_core.layers.dora import row_norms, squared_row_norms
from lora_core.layers.functional import dense_update
from lora_core.modules import base_attribute
from lora_core.targets import Target


class LoraEmbedding(nn.Module):
    """An update over a frozen embedding.

    Attributes:
        lora_embedding_A: (r, V), trained; initialized to zero.
        lora_embedding_B: (D, r), trained.
        magnitude: (D,), under DoRA.
    """

    row_squares: Tensor | None

    def __init__(self, base: nn.Embedding, target: Target, config: LoraConfig) -> None:
        """Build a zero update over `base`; raise TargetError if `base` is not a plain table."""
        super().__init__()
        check_table(base, target.name)
        vocabulary, width = base.num_embeddings, base.embedding_dim
        device = execution_device(base)
        self.base = base
        self.scale = target.scale
        self.dropout = 0.0  # as in PEFT: row numbers have no entries to drop
        self.lora_embedding_A = _zeros(target.rank, vocabulary, device=device)
        self.lora_embedding_B = _zeros(width, target.rank, device=device)
        self.magnitude = _zeros(width, device=device) if config.use_dora else None
        squares = torch.zeros(width, device=device) if config.use_dora else None
        self.register_buffer("row_squares", squares, persistent=False)

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw B again and set A to zero: the layer equals its base."""
        generator = generator_for(name, seed)
        drawn = torch.empty(self.lora_embedding_B.shape).normal_(generator=generator)
        self.lora_embedding_A.zero_()
        self.lora_embedding_B.copy_(drawn)
        if self.magnitude is not None and self.row_squares is not None:
            self.row_squares.copy_(squared_row_norms(self._weight().T))
            self.magnitude.copy_(self.row_squares.sqrt())

    def forward(self, input: Tensor) -> Tensor:
        """Map (…) of row numbers to (…, D)."""
        return self.updated(self.base(input), input, self._base())

    def updated(self, y: Tensor, ids: Tensor, table: nn.Embedding) -> Tensor:
        """Add the update to what `table` computed.

        Args:
            y: (…, D), the output of `table`, which has the base's weight.
            ids: (…), the row numbers.
            table: an embedding, whose factor also applies to the update.
        """
        rows = ids.to(y.device)  # an offloaded base computes on another device
        a = F.embedding(rows, self.lora_embedding_A.T, table.padding_idx)
        factor = factor_of(table)
        y = y + (a @ self.lora_embedding_B.T * self.scale * factor).to(y.dtype)
        return y if self.magnitude is None else y * self._row_factors().to(y.dtype)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Return what is trained and saved, under PEFT's names relative to the module's path."""
        tensors = {
            "lora_embedding_A": self.lora_embedding_A,
            "lora_embedding_B": self.lora_embedding_B,
        }
        if self.magnitude is not None:
            tensors["lora_magnitude_vector"] = self.magnitude
        return tensors

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW, (D, V) in float32; under DoRA with the change of row norms."""
        change = dense_update(self.lora_embedding_A, self.lora_embedding_B, self.scale)
        if self.magnitude is None:
            return change
        return self._row_factors()[:, None] * (self._weight().T + change) - self._weight().T

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the table with the update, (V, D) in float32."""
        return {"weight": self._weight() + self.delta().T}

    @property
    def weight(self) -> Tensor:
        """The effective table (V, D), for models that read it; the stored one if it is offloaded.

        Its gradient reaches A and B.
        """
        stored = self._base().weight
        if stored.is_meta or not stored.numel():
            return stored
        dtype = torch.promote_types(stored.dtype, torch.float32)
        factors = (self.lora_embedding_A, self.lora_embedding_B)
        effective = stored.to(dtype) + dense_update(*factors, self.scale, dtype).T
        if self.magnitude is not None:
            effective = effective * self._row_factors()
        return effective.to(stored.dtype)

    def _row_factors(self) -> Tensor:
        assert self.magnitude is not None and self.row_squares is not None
        factors = (self.lora_embedding_A, self.lora_embedding_B)
        return self.magnitude / row_norms(self._weight().T, self.row_squares, *factors, self.scale)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return base_attribute(self, name)

    def _base(self) -> nn.Embedding:
        assert isinstance(self.base, nn.Embedding)
        return self.base

    def _weight(self) -> Tensor:
        return loaded(self._base().weight, self._base()).float()


def check_table(module: nn.Embedding, name: str) -> None:
    """Refuse an embedding that does more than look up rows and multiply them by a factor.

    Its output is not a row of the table, so an update would be added to something else.
    """
    if module.max_norm is not None:
        raise TargetError(
            f"{name} has max_norm={module.max_norm}: each lookup rescales the rows of the table, "
            "which stays frozen under an adapter; set max_norm to None, "
            "or train the table in full with modules_to_save"
        )
    is_lookup = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if not (is_lookup and module.weight.is_floating_point()):
        raise TargetError(
            f"{name} is a {type(module).__name__} in {module.weight.dtype}, "
            "which does not just look vectors up; "
            "leave it out, or train it in full with modules_to_save"
        )


def factor_of(module: nn.Embedding) -> Tensor | float:
    """Return the factor that some embeddings (Gemma) apply to their vectors, rounded as they do."""
    factor: Tensor | float = getattr(module, "embed_scale", 1.0)
    return factor.to(module.weight.dtype) if isinstance(factor, Tensor) else factor


def _zeros(*shape: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device))
