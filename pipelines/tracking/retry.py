"""A tracking server that is away for a moment is waited for: what it was asked is asked again, which makes nothing twice."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.console import print_status
from pipelines.errors import UnreachableError

PATIENCE, PATIENCE_SECONDS = "LORA_REGISTRY_SECONDS", 90.0
"""Environment variable that says how long a server is waited for, and how long where it says nothing."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 20.0
Result = TypeVar("Result")


def until_it_answers(ask: Callable[[], Result]) -> Result:
    """Ask a server that may be away, again and again, for as long as the user has patience.

    Raises:
        UnreachableError: it was away all the time.
    """
    begun, pause = time.monotonic(), FIRST_PAUSE
    patience = float(os.environ.get(PATIENCE) or PATIENCE_SECONDS)
    while True:
        try:
            return ask()
        except UnreachableError as error:
            left = patience - (time.monotonic() - begun)
            if left <= 0:
                raise
            print_status(str(error), mark="…", aside=f"(asking again for {left:.0f} s)")
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
