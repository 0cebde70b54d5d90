"""Retries requests to a tracking server that is away for a moment; every request is idempotent."""

import os
from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
)

from pipelines.console import print_status
from pipelines.errors import UnreachableError, without_credentials

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
    seconds = float(os.environ.get(RETRY_VARIABLE) or RETRY_SECONDS)

    growing = wait_exponential(min=FIRST_PAUSE_SECONDS, max=MAX_PAUSE_SECONDS)

    def left(state: RetryCallState) -> float:
        return seconds - (state.seconds_since_start or 0.0)

    def pause(state: RetryCallState) -> float:
        return min(growing(state), left(state))

    def print_retry(state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        text = without_credentials(str(error))
        print_status(text, mark="…", aside=f"(retrying for {left(state):.0f} s)")

    retrying = Retrying(
        retry=retry_if_exception_type(UnreachableError),
        stop=stop_after_delay(seconds),
        wait=pause,
        before_sleep=print_retry,
        reraise=True,
    )
    return retrying(request)
