"""The trained parts that stand in a model: low-rank updates of each kind of layer, and what is trained whole."""
