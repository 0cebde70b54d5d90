"""Weights, file sizes and memory before anything is loaded."""
