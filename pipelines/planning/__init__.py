"""What a recipe will train, what it will cost, and what would fit: from configs and lengths, before any weight is loaded."""
