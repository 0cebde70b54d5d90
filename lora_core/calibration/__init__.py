"""Initialization that reads data or the full-precision weights: EVA, LoftQ, and how EVA distributes ranks."""
