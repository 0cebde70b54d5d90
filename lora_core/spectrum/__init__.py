"""ΔW without a model: singular values, truncation to a lower rank, combination of adapters."""
