"""From a conversation or a text to tokens and what is supervised, as at inference."""
