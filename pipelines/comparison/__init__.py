"""From item records to figures, differences and a verdict: pure functions."""
