"""The frozen model under an adapter: its weights behind one seam, its fingerprint, its checkpoint on disk."""
