"""What is left is the machine's, or the container's where that is less."""

from pathlib import Path

import psutil
import pytest

from pipelines.memory import free_memory_bytes


@pytest.mark.parametrize(
    ("limit", "left"),
    [("1000000", 1000000 - 600000 + 100000), ("max", None), ("many", None), (None, None)],
    ids=["confined", "not confined", "unreadable", "no control groups"],
)
def test_the_smaller_of_both_is_left(tmp_path: Path, limit: str | None, left: int | None) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("600000\n")
        (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 100000\n")
    found = free_memory_bytes(tmp_path)
    if left is not None:
        assert found == left
    else:
        assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)
