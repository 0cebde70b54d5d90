"""Parts of a training step outside the layers: loss, packed attention, parameter groups."""
