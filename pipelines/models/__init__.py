"""How a base model is read: which families are supported, by which path, and the proof that the path is the model's own."""
