"""From item records to metrics, differences and a verdict: pure functions."""
