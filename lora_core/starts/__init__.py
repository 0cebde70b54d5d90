"""How A and B start: drawn, from the weight, or from data."""
