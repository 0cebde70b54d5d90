"""Outputs and scores of a model, item by item: held-out examples and general abilities."""
