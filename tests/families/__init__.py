"""Every family of causal language models in transformers, tiny and random, read here and by its own forward."""
