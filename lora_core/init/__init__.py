"""Initialization of A and B: random, or from a decomposition of the weight."""
