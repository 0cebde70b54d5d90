"""The derivative of PEFT's loss by differences: it decides which of two gradients is right."""

from copy import deepcopy

import torch
from parity.features import trained
from parity.matrix.trial import Trial
from torch import Tensor, nn

STEP = 0.01
"""Change of the loss on each side, as a fraction of it: above rounding, below curvature."""
RIGHT, OFF = 0.02, 0.1
"""Largest relative error of a right derivative, and smallest one of a wrong derivative."""


def only_ours_is_the_derivative(trial: Trial, key: str) -> bool:
    """Return whether our gradient of a tensor is the derivative of PEFT's loss, and PEFT's is not.

    The derivative is taken along our gradient.
    """
    ours, theirs = (gradients_by_key(model)[key].flatten() for model in trial.pair)
    length = float(ours.norm())
    if not length:
        return False
    measured = _derivative(trial, key, ours / length)
    is_ours_right = abs(length - measured) <= RIGHT * length
    is_theirs_right = abs(float(theirs @ ours) / length - measured) <= OFF * length
    return is_ours_right and not is_theirs_right


def gradients_by_key(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all that is trained; zeros where there is none."""
    found: dict[str, Tensor] = {}
    for key, parameter in trained(model).items():
        gradient = parameter.grad
        found[key] = torch.zeros_like(parameter) if gradient is None else gradient
    return found


@torch.no_grad()
def _derivative(trial: Trial, key: str, direction: Tensor) -> float:
    """Return the central difference of the loss of PEFT's model with our file."""
    losses: list[float] = []
    step = 0.0
    for sign in (0, 1, -1):
        model = deepcopy(trial.in_peft).train(trial.in_training)
        parameter = trained(model)[key]
        parameter.add_(sign * step * direction.view_as(parameter))
        losses.append(float(trial.loss(model)))
        step = STEP * losses[0] / float(gradients_by_key(trial.pair[0])[key].norm())
    return (losses[1] - losses[2]) / (2 * step)
