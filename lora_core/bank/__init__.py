"""Several adapters on one base."""
