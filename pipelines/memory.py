"""How much memory is left here. Imports no torch."""

from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows control groups; a container sees its own at the top."""


def free_memory_bytes(groups: Path = GROUPS) -> int:
    """Return what the machine has left, or the container that this process is confined to where that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((groups / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (groups / "memory.stat").read_text().splitlines())
        return free if limit == "max" else min(free, int(limit) - int(used) + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no control groups, or of another make
        return free
