"""Compare each causal language model family of transformers, tiny and random, with its forward."""
