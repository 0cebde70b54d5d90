"""ΔW without a model: singular values, cuts to a lower rank, combinations."""
