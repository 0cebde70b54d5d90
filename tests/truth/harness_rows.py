"""Our scoring compared with lm-eval's, item by item: `scoring_bench.py` on few items."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "scoring_bench.py"
RESULT = BENCH.parents[2] / "build" / "scoring_truth.json"


def harness_rows(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Score the first items of each benchmark with both, on the run's base."""
    base = summary["base"]["folder"]
    few = ["--items", "10", "--rounds", "1", "--batches", "8"]
    subprocess.run(
        [sys.executable, str(BENCH), "--base", base, *few, "--result", str(RESULT)], check=True
    )
    yield from (
        one
        for one in json.loads(RESULT.read_text())
        if "cores" not in one["what"] and one["unit"] != "×"
    )
