"""Adapters as files: what one holds, how two differ, and whether one is intact."""
