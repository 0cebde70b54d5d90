"""Adapter files: PEFT's format plus an identity sidecar, read strictly, and other formats."""
