"""Prefect: cancellation, concurrency limits, the local server, deployments."""
