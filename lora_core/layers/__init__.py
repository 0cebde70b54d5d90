"""The adapter's modules: low-rank updates of each kind of layer, and modules trained in full."""
