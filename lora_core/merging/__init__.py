"""Merge an adapter into its base, in memory or on disk, and measure what the merge retains."""
