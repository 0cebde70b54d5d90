"""Runs that share a Prefect server take turns on a host: a global concurrency limit of 1 stands for each of its GPUs.

    gpu:node-a:0    the first GPU of node-a, gpu:node-a:1 the second: rank i computes on the i-th, so the name says which
    cpu:node-a      the cores of a host, all together, where none is used

A limit is made by the host itself when it first trains, since only there the GPUs can be counted, and is kept as its
administrator changes it: 0 refuses trainings, inactive lets them all through. A slot is leased: it is free again at
once when its holder ends in order, and LEASE_SECONDS later where the holder was killed or the host is gone.

Hosts that join another's training (`lora join`) hold none: a pool of theirs is not to train beside it.

A run that brings a Prefect server of its own asks nobody, so that plain `lora run` needs no server; two of them on one
host are told apart by the lock of the stage only, which keeps them from training the same thing twice.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL

from pipelines.errors import PipelineError, StageError, UnreachableError
from pipelines.orchestration.local_server import is_own

REFUSED = 422
"""HTTP status of a server on a limit that can never be had."""
LEASE_SECONDS = 120
"""Renewed after three quarters of it: a server may be away for the rest, and a slot of a killed run waits for all of it."""


def slot_names(count: int) -> list[str]:
    """Name the slots of the first `count` GPUs here, or of the cores where there is none."""
    host = gethostname()
    return [f"gpu:{host}:{gpu}" for gpu in gpus()[:count]] or [f"cpu:{host}"]


def gpus() -> list[str]:
    """Return the GPUs that this process may use, without asking CUDA, which would take memory on each."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu not in ("", "-1")]
    return sorted(
        (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int
    )


@contextmanager
def held(names: list[str], print_status: Callable[[str], None]) -> Iterator[None]:
    """Hold slots for the length of a block, and say so where they must be waited for.

    A server that does not answer at the end is of no account: the lease runs out by itself.

    Raises:
        PipelineError: the server does not answer or refuses.
    """
    if not names or is_own() or PREFECT_API_URL.value() is None:
        yield
        return
    try:
        with get_client(sync_client=True) as client:
            taken = [name for name in names if _is_taken(client, name)]
        if taken:
            print_status(f"waiting for {', '.join(taken)}, where another run is at work")
        lease = ExitStack()
        lease.enter_context(
            concurrency(
                names,
                strict=True,
                lease_duration=LEASE_SECONDS,
                raise_on_lease_renewal_failure=False,
            )
        )
    except httpx.HTTPError as error:
        raise _unanswered(error) from error
    except ConcurrencySlotAcquisitionError as error:
        raise _refused(error) if _status(error) == REFUSED else _unanswered(error) from error
    try:
        yield
    finally:
        try:
            lease.close()
        except httpx.HTTPError as error:
            print_status(
                f"the slots of {', '.join(names)} are free in {LEASE_SECONDS} s: the Prefect server does not answer ({error})"
            )


def _unanswered(error: Exception) -> StageError:
    return StageError(
        f"the Prefect server gives no slot on this host ({error}); see that it is well and run again",
        kind=UnreachableError.__name__,
    )


def _refused(error: Exception) -> PipelineError:
    return PipelineError(
        f"{error}; a limit of 0 refuses trainings here: raise it on the server's page of concurrency limits"
    )


def _status(error: BaseException | None) -> int | None:
    """Return the status by which a server refused, of an error or what it came from."""
    while error is not None:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code
        error = error.__cause__ or error.__context__
    return None


def _is_taken(client: SyncPrefectClient, name: str) -> bool:
    """Make a limit where it is missing; tell whether it has no slot left."""
    with suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    limit = client.read_global_concurrency_limit_by_name(name)
    return limit.active and limit.active_slots >= limit.limit > 0
