"""Serve registered adapters: an OpenAI-compatible server, and a resolver for vLLM."""
