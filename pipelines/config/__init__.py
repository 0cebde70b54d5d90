"""What a recipe can contain, and the experiments that it expands to. Imports no torch."""
