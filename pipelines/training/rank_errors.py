"""Know the host of each rank, and raise an error that names the ranks that no longer respond."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socket import gethostname

from accelerate.utils import gather_object

from pipelines.errors import PeerError, PipelineError
from pipelines.training.phase_timer import PhaseTimer

CONTACT = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe")
"""Words, one of which is in a backend's error if another rank is gone or silent."""
BACKEND_PREFIX = re.compile(r"^\[[^\]]*\]\s*")
REASON_CHARACTERS = 200


@dataclass(frozen=True)
class RankHosts:
    """The hosts of all ranks of a run, as seen by one of them."""

    rank: int
    hosts: list[str]
    """By rank."""

    def describe(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def others(self) -> str:
        """Name the ranks that may be lost: those on other hosts, or, on one host, all others."""
        ranks = range(len(self.hosts))
        own_host = self.hosts[self.rank]
        remote = [rank for rank in ranks if self.hosts[rank] != own_host]
        candidates = remote or [rank for rank in ranks if rank != self.rank]
        return ", ".join(map(self.describe, candidates))


def gather_hostnames() -> RankHosts:
    """Gather the hostname of every rank. A collective: every rank calls it."""
    from accelerate import PartialState

    return RankHosts(PartialState().process_index, gather_object([gethostname()]))


@contextmanager
def name_lost_rank(ranks: RankHosts, timer: PhaseTimer) -> Iterator[None]:
    """Turn a backend's error inside a block into one that names the lost rank and the step.

    Args:
        ranks: hosts of all ranks.
        timer: has the number of the step.

    Raises:
        PeerError: another rank ended or did not respond in time.
    """
    try:
        yield
    except RuntimeError as error:
        if len(ranks.hosts) < 2 or not _is_lost_contact(error):
            raise
        lost = f"{ranks.describe(ranks.rank)} lost {ranks.others()} in step {timer.step}"
        raise _lost(lost, error) from error


@contextmanager
def name_lost_contact() -> Iterator[None]:
    """Turn a backend's error outside of the steps into one that is known as a consequence.

    What another rank records about its own end is then kept as the cause.

    Raises:
        PeerError: another rank ended or did not respond in time.
    """
    try:
        yield
    except RuntimeError as error:
        is_alone = int(os.environ.get("WORLD_SIZE", "1")) < 2
        if is_alone or isinstance(error, PipelineError) or not _is_lost_contact(error):
            raise
        rank = os.environ.get("RANK", "0")
        raise _lost(f"rank {rank} lost another rank outside of the steps", error) from error


def _lost(what: str, error: RuntimeError) -> PeerError:
    first_line = str(error).strip().splitlines()[0]
    reason = BACKEND_PREFIX.sub("", first_line)[:REASON_CHARACTERS]
    return PeerError(
        f"{what} ({reason}); check that process and the network, and run again: the run resumes "
        "from the last checkpoint"
    )


def _is_lost_contact(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in CONTACT)
