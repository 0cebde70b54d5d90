"""How A and B start: at random, or from the singular vectors of the weight."""
