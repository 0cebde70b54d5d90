"""The loss of a pack as one module: engines hook into the modules that are called, so what they wrap must be what is called.

Shapes: states (N, D) of the positions that predict, weight (V, D), targets (N,).
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core.training.losses import linear_cross_entropy
from pipelines.batches import Pack
from pipelines.model import head_weight, hidden_states


class Objective(nn.Module):
    """A language model with its loss."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head = LossHead(head_weight(model))

    def forward(self, part: Pack) -> Tensor:
        """Return the pack's summed negative log-likelihood in nats; the head sees the supervised positions only."""
        states = hidden_states(self.model, part.input_ids, part.position_ids, part.segments)
        loss: Tensor = self.head(states[part.predicts], part.targets)
        return loss


class LossHead(nn.Module):
    """The output head's weight and the loss in one module, so that an engine that shares out weights gathers this one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        assert isinstance(weight, nn.Parameter), "a language model's head holds a parameter"
        self.weight = weight

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(states, self.weight, targets)


def trained_parameters(objective: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, under the names that the model gives it."""
    named = objective.named_parameters()
    return {name.removeprefix("model."): parameter for name, parameter in named if parameter.requires_grad}
