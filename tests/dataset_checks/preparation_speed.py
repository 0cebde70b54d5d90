"""Seconds and memory of preparing generated rows, next to TRL's SFTTrainer with the same tokenizer.

Each preparation runs in a separate process. Seconds are measured inside, without imports; memory is
the largest sum of the resident sets of the process and its children.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from parity.rows import Row, at_least, figure
from pydantic import TypeAdapter

from dataset_checks.generated_rows import KINDS, write_generated
from dataset_checks.timed_preparation import PreparationTask, PreparationTime
from lora_core.files import write_json
from pipelines.models.base_model import identify
from pipelines.models.base_tokenizer import base_tokenizer

BASE = "embedded:SmolLM2-135M-Instruct"
QUICK_ROWS = (2_000,)
ALL_ROWS = (10_000, 100_000, 1_000_000)
POLL_SECONDS = 0.25
"""Between two readings of the memory, which take time from the cores that prepare."""
ROUNDS = 3
"""How often sizes of up to SHORT_ROWS are prepared, which takes seconds; the medians count."""
SHORT_ROWS = 10_000
GIB = 1 << 30
PROCESSES = (None, 2)
"""Numbers of processes with which TRL is tried."""


@dataclass(frozen=True)
class Timed:
    """One preparation."""

    time: PreparationTime
    peak_gib: float


def speed_rows(sizes: Sequence[int], *, is_quick: bool) -> list[Row]:
    """Measure each kind of rows in each size, in ascending order.

    Args:
        sizes: numbers of rows.
        is_quick: only conversations, TRL with one process only, and no goal.
    """
    rows: list[Row] = []
    with base_tokenizer(identify(BASE, None)) as base, TemporaryDirectory() as scratch:
        for kind in KINDS[:1] if is_quick else KINDS:
            processes: Sequence[int | None] = PROCESSES[:1] if is_quick else PROCESSES
            for size in sizes:
                file = Path(scratch) / f"{kind}-{size}.jsonl"
                write_generated(file, kind, size)
                task = PreparationTask(str(file), base.folder, "", kind == "conversations")
                rounds = ROUNDS if size <= SHORT_ROWS and not is_quick else 1
                ours, theirs = _medians(task, processes, rounds)
                best = min(theirs, key=lambda count: theirs[count].time.seconds)
                rows += _rows_of(f"{size:,} {kind}", ours, theirs[best], has_goal=not is_quick)
                processes = (best,)  # larger sizes take minutes
                file.unlink()
    return rows


def _medians(
    task: PreparationTask, processes: Sequence[int | None], rounds: int
) -> tuple[Timed, dict[int | None, Timed]]:
    """Time ours and TRL's with each number of processes in turn; return the medians by seconds."""
    ours = list[Timed]()
    theirs: dict[int | None, list[Timed]] = {count: [] for count in processes}
    for _ in range(rounds):
        ours.append(_timed("ours", task))
        for count in processes:
            theirs[count].append(_timed("trl", replace(task, processes=count)))
    return _median(ours), {count: _median(times) for count, times in theirs.items()}


def _median(times: list[Timed]) -> Timed:
    return sorted(times, key=lambda timed: timed.time.seconds)[len(times) // 2]


def _rows_of(what: str, ours: Timed, theirs: Timed, *, has_goal: bool) -> list[Row]:
    ratio = theirs.time.seconds / ours.time.seconds
    name = f"{what}: TRL s / s"
    rows = [at_least(name, ratio, 1.0) if has_goal else figure(name, ratio)]
    for label, timed in (("", ours), ("TRL ", theirs)):
        tokens = round(timed.time.tokens / timed.time.examples)
        rows += [
            figure(f"{what}: {label}s", timed.time.seconds, "s"),
            figure(f"{what}: {label}CPU s", timed.time.cpu_seconds, "s"),
            figure(f"{what}: {label}GiB", timed.peak_gib, "GiB"),
            figure(f"{what}: {label}tokens", tokens, "per row"),
        ]
    return rows


def _timed(contestant: str, task: PreparationTask) -> Timed:
    """Run one preparation in a separate process."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "prepared"
        folder.mkdir()
        task_file, result_file = Path(scratch) / "task.json", Path(scratch) / "result.json"
        write_json(task_file, asdict(replace(task, folder=str(folder))))
        module = "dataset_checks.timed_preparation"
        # As in a stage of a run; TRL tokenizes row by row, so it makes no difference to it.
        environment = {
            **os.environ,
            "HF_DATASETS_CACHE": scratch,
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", module, contestant, str(task_file), str(result_file)],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        peak = _peak_bytes(process)
        if process.returncode:
            raise RuntimeError(f"{contestant} ended with exit code {process.returncode}")
        measured = TypeAdapter(PreparationTime).validate_json(result_file.read_text())
        return Timed(measured, peak / GIB)


def _peak_bytes(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a process; return the most memory that it and its children have at a time."""
    root = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _tree_bytes(root))
        time.sleep(POLL_SECONDS)
    return peak


def _tree_bytes(root: psutil.Process) -> int:
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it has just ended
    return total
