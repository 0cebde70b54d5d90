"""Training on any number of ranks under any engine: the loop, what the engine wraps, checkpoints, what is written."""
