"""What a model answers: held-out examples of the task, and questions of general ability, item by item."""
