"""Which process each rank is, and an error that names those that do not answer any more."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socket import gethostname

from accelerate.utils import gather_object

from pipelines.errors import PeerError
from pipelines.training.phase_timer import PhaseTimer

CONTACT = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe")
"""Words of which the backends' errors have one where a peer is gone or silent."""


@dataclass(frozen=True)
class Peers:
    """The ranks of a run, as seen by one of them."""

    rank: int
    hosts: list[str]
    """By rank."""

    def others(self) -> str:
        """Name those that may have gone: the ranks on other hosts, or where there are none all others."""
        far = [rank for rank, host in enumerate(self.hosts) if host != self.hosts[self.rank]]
        named = far or [rank for rank in range(len(self.hosts)) if rank != self.rank]
        return ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in named)


def gather_hostnames() -> Peers:
    """Ask every rank where it runs; all ranks call it."""
    from accelerate import PartialState

    return Peers(PartialState().process_index, gather_object([gethostname()]))


@contextmanager
def name_lost_rank(peers: Peers, heart: PhaseTimer) -> Iterator[None]:
    """Turn a backend's error inside a block into one that says who does not answer, in which step.

    Raises:
        PeerError: another rank ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if len(peers.hosts) < 2 or not any(word in str(error).lower() for word in CONTACT):
            raise
        reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip().splitlines()[0])[:200]
        raise PeerError(
            f"rank {peers.rank} on {peers.hosts[peers.rank]} lost {peers.others()} in step {heart.step} ({reason}); "
            "see that its process and the network are well, and run again: it goes on from the last checkpoint"
        ) from error
