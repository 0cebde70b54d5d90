"""What a training step needs besides the layers: the loss, attention inside a pack, parameter groups."""
