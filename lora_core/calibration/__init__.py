"""Initialization from data or full-precision weights: EVA, LoftQ, and EVA's choice of ranks."""
