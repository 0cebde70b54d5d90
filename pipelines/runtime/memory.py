"""How much memory is left here. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows control groups, and which of them this process is in; a container sees its own at the top."""


SHORTAGE = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
"""Words of PyTorch's errors for want of memory that are not errors of their own kind."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory did not suffice, on a CPU or a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in SHORTAGE)
    )


def free_memory_bytes(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Return what the machine has left, or a group that this process is confined to where that is less."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups(groups, own)])


def _left_in_groups(groups: Path, own: Path) -> Iterator[int]:
    """Yield what each limited group has left, from the process's own up to the top."""
    try:
        place = own.read_text().rpartition("::/")[2].strip()
    except OSError:  # no Linux
        return
    for group in (groups / place, *(groups / place).parents):
        try:
            limit, used = (
                int((group / f"memory.{name}").read_text()) for name in ("max", "current")
            )
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield limit - used + int(stat["inactive_file"])
        except (OSError, ValueError, KeyError):  # not limited, or of another make
            continue
