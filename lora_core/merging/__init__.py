"""Merging an adapter into its base, in memory or on disk, and what a merge keeps."""
