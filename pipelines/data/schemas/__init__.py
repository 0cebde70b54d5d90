"""From a row to a conversation or a text, for every common layout of columns."""
