"""A lease on the name of a registered model: one process at a time registers and promotes.

MLflow has no compare-and-set, so each contender writes its own tag on the registered model and
then reads all of them. It holds the lease if it sees no other tag that has not expired. Every
contender writes before it reads; of two contenders at least one therefore sees the other (the flag
principle: Herlihy and Shavit, The Art of Multiprocessor Programming, 2008, section 2.3). If both
see each other, the one with the lower tag waits, and the other withdraws its tag.

A process that is killed blocks the name until its tag expires. The hosts' clocks must agree to
within a fraction of LEASE_SECONDS.
"""

import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from getpass import getuser
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from pipelines.errors import RegistryError
from pipelines.runtime.interfaces.values import Values

LEASE_TAG = "lora.lease."
LEASE_SECONDS = 120.0
"""Time after which a lease that is not renewed expires."""
WAIT_SECONDS = 900.0
"""How long a process waits for others."""
FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 1.0


class LeaseTag(Values):
    """The value of a tag."""

    until: float
    """When it expires, in seconds since 1970."""
    holder: str
    """Who wrote it."""


@dataclass(frozen=True)
class Lease:
    """One process's tag on a registered model."""

    client: MlflowClient
    name: str
    """The registered model."""
    tag: str = field(default_factory=lambda: LEASE_TAG + uuid4().hex)

    def renew(self) -> None:
        """Extend the lease.

        Raises:
            RegistryError: it has expired, so that another process may have it.
        """
        if self.tag not in live_leases(self.client, self.name):
            raise RegistryError(
                f"the lease on {self.name} expired after {LEASE_SECONDS:.0f} s, so that another "
                "process may register there; run the recipe again, which registers what is missing"
            )
        self.write()

    def write(self) -> None:
        """Write the tag, with a new expiry."""
        value = LeaseTag(until=time.time() + LEASE_SECONDS, holder=acting_user())
        self.client.set_registered_model_tag(self.name, self.tag, value.model_dump_json())

    def withdraw(self) -> None:
        """Remove the tag."""
        self.client.delete_registered_model_tag(self.name, self.tag)


@contextmanager
def hold_lease(client: MlflowClient, name: str) -> Iterator[Lease]:
    """Wait for the lease on a registered model, which exists; release it after the block.

    Raises:
        RegistryError: another process had it for all of WAIT_SECONDS.
    """
    lease = Lease(client, name)
    try:
        _acquire(lease)
        yield lease
    finally:
        with suppress(MlflowException):  # a tag that cannot be removed expires
            lease.withdraw()


def live_leases(client: MlflowClient, name: str) -> dict[str, str]:
    """Return the tags on a registered model that have not expired, with their holders."""
    leases = {}
    for tag, text in client.get_registered_model(name).tags.items():
        if tag.startswith(LEASE_TAG):
            held = _parsed_lease(name, tag, text)
            if held.until > time.time():
                leases[tag] = held.holder
    return leases


def _parsed_lease(name: str, tag: str, text: str) -> LeaseTag:
    try:
        return LeaseTag.model_validate_json(text)
    except ValidationError as error:
        raise RegistryError(
            f"the tag {tag} of the registered model {name} is {text[:60]!r}, which is not a lease; "
            "delete the tag, and run the recipe again"
        ) from error


def acting_user() -> str:
    """Return who acts: the user's name and the host."""
    return f"{user_name()} on {socket.gethostname()}"


def user_name() -> str:
    """Return the user's name, at MLflow or on this host."""
    name = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if name:
        return name
    try:
        return getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return f"user {os.getuid()}"


def _acquire(lease: Lease) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    pause = FIRST_PAUSE_SECONDS
    is_contending = False
    while True:
        if is_contending:
            lease.write()  # before each read: the tag must not have expired
        others = live_leases(lease.client, lease.name)
        others.pop(lease.tag, None)
        if not others and is_contending:
            return
        if not others:
            is_contending = True
            continue
        if is_contending and min(others) < lease.tag:
            lease.withdraw()
            is_contending = False
        if time.monotonic() > deadline:
            raise RegistryError(
                f"{', '.join(others.values())} has registered in {lease.name} for "
                f"{WAIT_SECONDS:.0f} s; run the recipe again when that has ended"
            )
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, MAX_PAUSE_SECONDS)
