"""From rows to messages, masked tokens and splits, and the examples of each step."""
