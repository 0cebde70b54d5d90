"""Free memory on this machine. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux lists control groups, and the group of this process; a container sees its own group
as the root."""
SHORTAGE = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "could not create a primitive",
    "could not create a memory object",
)
"""Substrings of out-of-memory errors without a separate exception type, of PyTorch and of oneDNN,
which multiplies in bfloat16."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the CPU or the GPU ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SHORTAGE)


def free_memory_bytes(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Return the machine's free memory, or that of the process's control group if it is smaller.

    Args:
        groups: where control groups are mounted.
        own: file with the group of this process.
    """
    available = int(psutil.virtual_memory().available)
    return min([available, *_free_in_groups(groups, own)])


def _free_in_groups(groups: Path, own: Path) -> Iterator[int]:
    """Yield the free memory of each limited group, from the process's own group up to the root."""
    try:
        group_path = own.read_text().rpartition("::/")[2].strip()
    except OSError:  # not Linux
        return
    group = groups / group_path
    for folder in (group, *group.parents):
        try:
            yield _free_in_group(folder)
        except (OSError, ValueError, KeyError):  # not limited, or in another format
            continue


def _free_in_group(folder: Path) -> int:
    limit = int((folder / "memory.max").read_text())
    used = int((folder / "memory.current").read_text())
    lines = (folder / "memory.stat").read_text().splitlines()
    statistics = dict(line.split() for line in lines)
    return limit - used + int(statistics["inactive_file"])
