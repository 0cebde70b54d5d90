"""What is left is the machine's, or the container's where that is less."""

from pathlib import Path

import psutil
import pytest

from pipelines.runtime.memory import free_memory_bytes


@pytest.mark.parametrize(
    ("limit", "left"),
    [("1000000", 1000000 - 600000 + 100000), ("max", None), ("many", None), (None, None)],
    ids=["confined", "not confined", "unreadable", "no control groups"],
)
@pytest.mark.parametrize("place", ["", "job", "job/step"])
def test_the_smallest_of_all_is_left(
    tmp_path: Path, limit: str | None, left: int | None, place: str
) -> None:
    own, group = tmp_path / "own", tmp_path / "groups" / "job"
    own.write_text(f"0::/{place}\n")
    (group / "step").mkdir(parents=True)
    (group / "step" / "memory.max").write_text("max\n")
    confined = group if place else group.parent
    if limit is not None:
        (confined / "memory.max").write_text(f"{limit}\n")
        (confined / "memory.current").write_text("600000\n")
        (confined / "memory.stat").write_text("anon 400000\ninactive_file 100000\n")
    found = free_memory_bytes(tmp_path / "groups", own)
    assert (
        found == left
        if left is not None
        else found == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    )


def test_a_machine_without_control_groups_has_what_it_has(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path, tmp_path / "none") > 0
