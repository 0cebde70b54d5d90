"""The frozen model under an adapter: its weights, its fingerprint, its checkpoint on disk."""
