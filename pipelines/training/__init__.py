"""Train on any number of ranks under any engine: loop, engines, checkpoints and output."""
