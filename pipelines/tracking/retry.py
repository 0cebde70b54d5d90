"""Retries requests to a tracking server that is away for a moment; every request is idempotent."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.console import print_status
from pipelines.errors import UnreachableError

RETRY_VARIABLE = "LORA_REGISTRY_SECONDS"
"""Environment variable for how long requests are retried."""
RETRY_SECONDS = 90.0
"""The default of that variable."""
FIRST_PAUSE_SECONDS = 2.0
MAX_PAUSE_SECONDS = 20.0
Result = TypeVar("Result")


def retry_until_reachable(request: Callable[[], Result]) -> Result:
    """Send a request again and again, with growing pauses, while the server is away.

    Raises:
        UnreachableError: the server was away for the entire retry time.
    """
    started = time.monotonic()
    pause = FIRST_PAUSE_SECONDS
    retry_seconds = float(os.environ.get(RETRY_VARIABLE) or RETRY_SECONDS)
    while True:
        try:
            return request()
        except UnreachableError as error:
            left = retry_seconds - (time.monotonic() - started)
            if left <= 0:
                raise
            print_status(str(error), mark="…", aside=f"(retrying for {left:.0f} s)")
            time.sleep(min(pause, left))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
