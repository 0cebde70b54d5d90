"""Estimates of weights, file sizes, memory and communication before a model is loaded."""
