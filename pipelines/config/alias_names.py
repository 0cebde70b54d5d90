"""The aliases of a registered model."""

CANDIDATE = "candidate"
"""The newest adapter that was not rejected."""
PROPOSED = "proposed"
"""An adapter that waits for a person's decision."""
CHAMPION = "champion"
"""The adapter that passes the gate and gains most; what users read."""
