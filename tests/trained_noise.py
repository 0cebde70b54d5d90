"""Noise in what an adapter trains, so that its updates change the outputs."""

import torch
from torch import nn


@torch.no_grad()
def add_noise(model: nn.Module) -> nn.Module:
    """Change every trained parameter and return the model; equal models get equal noise."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    return model
