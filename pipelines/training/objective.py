"""The loss of a pack as one module.

Engines hook into the modules that are called, so they must wrap the module that is called.

Shapes: states (N, D) of the positions that predict, weight (V, D), targets (N,).
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipelines.models.forward import PackReader
from pipelines.models.head import Head
from pipelines.models.packs import Pack


class Objective(nn.Module):
    """A language model with its loss."""

    def __init__(self, model: PreTrainedModel, reader: PackReader | None = None) -> None:
        """Wrap a model; without a reader, use the fastest one not known to be wrong, unverified."""
        super().__init__()
        self.model = model
        self.reader = PackReader.default(model) if reader is None else reader
        self.head = None if self.reader.head is None else LossHead(self.reader.head)

    def forward(self, part: Pack) -> Tensor:
        """Return the pack's summed negative log-likelihood in nats.

        The head sees the supervised positions only.
        """
        rows = self.reader.rows(part)
        if self.head is None:
            return F.cross_entropy(rows.float(), part.targets, reduction="sum")
        loss: Tensor = self.head(rows, part.targets)
        return loss


class LossHead(nn.Module):
    """The output head's weights and the loss in one module, so that ZeRO-3 gathers the weights."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        assert isinstance(head.weight, nn.Parameter), "a language model's head holds a parameter"
        self.weight = head.weight
        self.bias = head.bias
        self.transform = head.transform

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        return Head(self.weight, self.bias, self.transform).loss(states, targets)


def trained_parameters(objective: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters, by their names in the model."""
    return {
        name.removeprefix("model."): parameter
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad
    }
