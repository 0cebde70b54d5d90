"""Concurrency limits: runs that share a Prefect server take turns on a host's GPUs.

    gpu:node-a:0    the first GPU of node-a, gpu:node-a:1 the second: rank i computes on the i-th
    cpu:node-a      all cores of a host together, if it has no GPU
    recipe:NAME     one run of a recipe: another waits, then reuses the results of the first

Each name is a global concurrency limit of 1. The host itself creates a limit when it first trains,
since only there the GPUs can be counted. An administrator may change it: 0 rejects trainings,
inactive allows all of them. A slot is leased: it is free immediately when its holder ends in order,
and LEASE_SECONDS later if the holder was killed or the host is gone.

A host that joins another's training (`lora join`) holds its own slots for the time of the training.

A run with a local Prefect server holds no slots, so that plain `lora run` needs no server. Two of
them on one host are separated by the lock of the stage only, which prevents them from training the
same experiment twice.
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

from pipelines.errors import PipelineError, StageError, UnreachableError, one_line
from pipelines.orchestration.local_server import is_server_local

REJECTED = 422
"""HTTP status of a server for a limit that no one can acquire."""
LEASE_SECONDS = 120
"""A lease is renewed after three quarters of it. The server may be away for the rest, and a killed
run blocks its slot for all of it."""


def slot_names(count: int) -> list[str]:
    """Return the slots of this host's first `count` GPUs, or of its cores if it has no GPU."""
    host = gethostname()
    return [f"gpu:{host}:{gpu}" for gpu in gpus()[:count]] or [f"cpu:{host}"]


def recipe_slot(name: str) -> str:
    """Return the slot of a recipe.

    It takes the place of a limit of the deployment: if the server is away when Prefect renews the
    lease of such a limit, Prefect ends the run.
    """
    return f"recipe:{name}"


def gpus() -> list[str]:
    """Return the GPUs that this process may use, without CUDA, which would use memory on each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu not in ("", "-1")]
    devices = Path("/dev").glob("nvidia[0-9]*")
    return sorted((path.name.removeprefix("nvidia") for path in devices), key=int)


@contextmanager
def hold_slots(names: list[str], print_status: Callable[[str], None]) -> Iterator[None]:
    """Hold slots for the duration of a block; print a line if another run uses them.

    If the server does not answer at the end, the lease expires on its own.

    Args:
        names: see `slot_names`; nothing is held without any.
        print_status: prints one line.

    Raises:
        PipelineError: the server does not answer or refuses.
    """
    if not names or is_server_local() or PREFECT_API_URL.value() is None:
        yield
        return
    try:
        lease = _acquire(names, print_status)
    except httpx.HTTPError as error:
        raise _unanswered(error) from error
    except ConcurrencySlotAcquisitionError as error:
        raise _refused(error) if _status(error) == REJECTED else _unanswered(error) from error
    try:
        yield
    finally:
        try:
            lease.close()
        except httpx.HTTPError as error:
            print_status(
                f"the slots of {', '.join(names)} are free in {LEASE_SECONDS} s: the Prefect "
                f"server does not answer ({one_line(error, with_type=False)})"
            )


def _acquire(names: list[str], print_status: Callable[[str], None]) -> ExitStack:
    """Acquire a lease of all slots; close the returned stack to release it."""
    with get_client(sync_client=True) as client:
        taken = [name for name in names if _is_taken(client, name)]
    if taken:
        print_status(f"waiting for {', '.join(taken)}, which another run uses")
    lease = ExitStack()
    lease.enter_context(
        concurrency(
            names,
            strict=True,
            lease_duration=LEASE_SECONDS,
            raise_on_lease_renewal_failure=False,
        )
    )
    return lease


def _unanswered(error: Exception) -> StageError:
    reason = one_line(error, with_type=False)
    return StageError(
        f"the Prefect server gives no slot on this host ({reason}); check the server and run again",
        kind=UnreachableError.__name__,
    )


def _refused(error: Exception) -> PipelineError:
    return PipelineError(
        f"{error}; a limit of 0 rejects trainings here: raise it on the server's page of "
        "concurrency limits"
    )


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status with which a server refused, from an error or from its cause."""
    while error is not None:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code
        error = error.__cause__ or error.__context__
    return None


def _is_taken(client: SyncPrefectClient, name: str) -> bool:
    """Create a limit if it is missing; return whether it has no free slot."""
    with suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    limit = client.read_global_concurrency_limit_by_name(name)
    return limit.active and limit.active_slots >= limit.limit > 0
