"""LoraEmbedding: a table of vectors with a low-rank update, y = W0[ids] + s · A[:, ids]ᵀ Bᵀ.

The table is W0ᵀ of the usual picture: it stores (V, D), so its update is ΔW = s · B A with A (R, V) and B (D, R). As in
PEFT it is A that starts at zero and B that is drawn.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.config import LoraConfig
from lora_core.errors import TargetError
from lora_core.init.random import generator_for
from lora_core.layers.dora import row_norms, squared_row_norms
from lora_core.layers.functional import dense_update
from lora_core.targets import Target


class LoraEmbedding(nn.Module):
    """An update over a frozen embedding.

    Attributes:
        lora_embedding_A: (r, V), trained; zero at the start.
        lora_embedding_B: (D, r), trained.
        magnitude: (D,), under DoRA.
    """

    row_squares: Tensor | None

    def __init__(self, base: nn.Embedding, target: Target, config: LoraConfig) -> None:
        """Build an update of zero over `base`; raises TargetError where that is more than a table of vectors."""
        super().__init__()
        check_table(base, target.name)
        device = base.weight.device
        self.base = base
        self.scale = target.scale
        self.dropout = 0.0  # as in PEFT: there is no input whose parts could be dropped
        self.lora_embedding_A = nn.Parameter(
            torch.zeros(target.rank, base.num_embeddings, device=device)
        )
        self.lora_embedding_B = nn.Parameter(
            torch.zeros(base.embedding_dim, target.rank, device=device)
        )
        self.magnitude = (
            nn.Parameter(torch.zeros(base.embedding_dim, device=device))
            if config.use_dora
            else None
        )
        squares = torch.zeros(base.embedding_dim, device=device) if config.use_dora else None
        self.register_buffer("row_squares", squares, persistent=False)

    @torch.no_grad()
    def reset(self, name: str, config: LoraConfig, seed: int) -> None:
        """Draw B anew and set A to zero: the layer is its base again."""
        drawn = torch.empty(self.lora_embedding_B.shape).normal_(
            generator=generator_for(name, seed)
        )
        self.lora_embedding_A.zero_()
        self.lora_embedding_B.copy_(drawn)
        if self.magnitude is not None and self.row_squares is not None:
            self.row_squares.copy_(squared_row_norms(self._weight().T))
            self.magnitude.copy_(self.row_squares.sqrt())

    def forward(self, ids: Tensor) -> Tensor:
        """Map (…) of row numbers to (…, D)."""
        y: Tensor = self.base(ids)
        a = F.embedding(ids, self.lora_embedding_A.T, self._base().padding_idx)
        factor = factor_of(self._base())
        y = y + (a @ self.lora_embedding_B.T * self.scale * factor).to(y.dtype)
        return y if self.magnitude is None else y * self._row_factors().to(y.dtype)

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """What is trained and saved, under PEFT's names after the module's path."""
        tensors = {
            "lora_embedding_A": self.lora_embedding_A,
            "lora_embedding_B": self.lora_embedding_B,
        }
        return (
            tensors
            if self.magnitude is None
            else {**tensors, "lora_magnitude_vector": self.magnitude}
        )

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return ΔW, (D, V) in float32; of DoRA, what its rows' lengths change as well."""
        change = dense_update(self.lora_embedding_A, self.lora_embedding_B, self.scale)
        if self.magnitude is None:
            return change
        return self._row_factors()[:, None] * (self._weight().T + change) - self._weight().T

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the table with the update in it, (V, D) in float32."""
        return {"weight": self._weight() + self.delta().T}

    @property
    def weight(self) -> Tensor:
        """The base's table."""
        return self._base().weight

    def _row_factors(self) -> Tensor:
        assert self.magnitude is not None and self.row_squares is not None
        factors = (self.lora_embedding_A, self.lora_embedding_B)
        return self.magnitude / row_norms(self._weight().T, self.row_squares, *factors, self.scale)

    def _base(self) -> nn.Embedding:
        assert isinstance(self.base, nn.Embedding)
        return self.base

    def _weight(self) -> Tensor:
        return self._base().weight.float()


def check_table(module: nn.Embedding, name: str) -> None:
    """Refuse an embedding whose answer is not its table's rows, at most times a factor: an update would be added to something else."""
    is_looked_up = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if not (is_looked_up and module.weight.is_floating_point()):
        raise TargetError(
            f"{name} is a {type(module).__name__} in {module.weight.dtype}, which does not just look vectors up; "
            "leave it out, or train it whole with modules_to_save"
        )


def factor_of(module: nn.Embedding) -> Tensor | float:
    """Return what some models (Gemma) multiply their vectors with inside the embedding, rounded as they do."""
    factor: Tensor | float = getattr(module, "embed_scale", 1.0)
    return factor.to(module.weight.dtype) if isinstance(factor, Tensor) else factor
