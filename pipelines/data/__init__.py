"""From rows to messages, masked tokens and splits; which examples make up which step."""
