"""The flow, step by step, from a recipe to a compared, checked and registered adapter.

Start reading in flows.py.
"""
