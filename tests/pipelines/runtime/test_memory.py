"""Free memory is that of the machine, or of the container if it has less."""

from pathlib import Path

import psutil
import pytest

from pipelines.runtime.memory import free_memory_bytes


@pytest.mark.parametrize(
    ("limit", "free"),
    [("1000000", 1000000 - 600000 + 100000), ("max", None), ("many", None), (None, None)],
    ids=["limited", "not limited", "unreadable", "no control groups"],
)
@pytest.mark.parametrize("group_path", ["", "job", "job/step"])
def test_free_memory_is_the_minimum_over_machine_and_groups(
    tmp_path: Path, limit: str | None, free: int | None, group_path: str
) -> None:
    own = tmp_path / "own"
    group = tmp_path / "groups" / "job"
    own.write_text(f"0::/{group_path}\n")
    (group / "step").mkdir(parents=True)
    (group / "step" / "memory.max").write_text("max\n")
    limited = group if group_path else group.parent
    if limit is not None:
        (limited / "memory.max").write_text(f"{limit}\n")
        (limited / "memory.current").write_text("600000\n")
        (limited / "memory.stat").write_text("anon 400000\ninactive_file 100000\n")
    measured = free_memory_bytes(tmp_path / "groups", own)
    if free is not None:
        assert measured == free
    else:
        assert measured == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_free_memory_without_control_groups(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path, tmp_path / "none") > 0
