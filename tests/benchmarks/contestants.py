"""The contestants of the training benchmark, each in a fresh process on the CPU.

A competitor runs in every dtype that it offers, and is timed in the one that is fastest here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rows import BUILD, GIB, Row, console

from lora_core.files import write_json

HERE = Path(__file__).resolve().parent
WORK = BUILD / "bench"
OURS, PEFT, TRL = "ours", "peft", "trl"
OURS_FLOAT32 = "ours-float32"
PEFT_FLOAT32, PEFT_BFLOAT16 = "peft-float32", "peft-bfloat16"
TRL_FLOAT32, TRL_BFLOAT16 = "trl-float32", "trl-bfloat16"
TRL_FLOAT32_ADAPTER = "trl-float32-adapter"
NAMES = {
    OURS: "ours",
    OURS_FLOAT32: "ours, float32",
    PEFT_FLOAT32: "bare PEFT loop, float32",
    PEFT_BFLOAT16: "bare PEFT loop, bfloat16",
    TRL_FLOAT32: "TRL, float32 base",
    TRL_BFLOAT16: "TRL, bf16=True",
    TRL_FLOAT32_ADAPTER: "TRL, float32 base and adapter",
}
THREADS = "BENCH_THREADS"
"""Environment variable with the number of cores to use; all by default."""
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Environment in which PyTorch and its libraries use no units wider than AVX2."""
NO_LIMITS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Figures:
    """What one run of a contestant reports, step by step."""

    losses: list[float]
    ends: list[dict[str, float]]
    tokens: list[int]
    products_seconds: float | None = None
    """Of the matrix products of the last step alone; only ours measures them."""

    def tokens_per_second(self, steps: int) -> float:
        """Return the speed of steps 2 to `steps`."""
        return sum(self.tokens[1:steps]) / self._passed("clock", steps)

    def core_share(self, steps: int) -> float:
        """Return the fraction of the machine's cores that the contestant had in these steps."""
        return self._passed("cores", steps) / self._passed("clock", steps) / threads()

    def peak_gib(self, steps: int) -> float:
        """Return the peak of resident memory in the first `steps` steps."""
        return self.ends[steps - 1]["peak"] / GIB

    @property
    def last_step_seconds(self) -> float:
        """Return the duration of the last step."""
        return self.ends[-1]["clock"] - self.ends[-2]["clock"]

    def _passed(self, clock: str, steps: int) -> float:
        return self.ends[steps - 1][clock] - self.ends[0][clock]


def run_all(
    names: Iterable[str],
    task: Row,
    steps: Mapping[str, int],
    *,
    timed: int,
    limits: Mapping[str, str] = NO_LIMITS,
) -> dict[str, Figures]:
    """Run contestants one after the other; print the speed of each.

    Args:
        names: of the contestants, in order.
        task: of all of them.
        steps: of each contestant.
        timed: steps whose speed is printed, with the first one.
        limits: environment variables that restrict the processor's units.
    """
    found = {}
    for name in names:
        figures = Figures(**run(name, {**task, "steps": steps[name]}, limits))
        found[name] = figures
        label = NAMES[name] + ", on AVX2" * bool(limits)
        speed = figures.tokens_per_second(timed)
        share = figures.core_share(timed)
        console.print(
            f"{label:<32}{speed:8.1f} tokens/s {figures.peak_gib(timed):6.2f} GiB "
            f"{share:6.0%} of the cores",
            highlight=False,
        )
    return found


def run(name: str, task: Row, limits: Mapping[str, str] = NO_LIMITS) -> Row:
    """Run one contestant in a fresh process and return what it reported.

    Raises:
        SystemExit: it failed; the error contains the end of its output.
    """
    script = "ours.py" if name in (OURS, OURS_FLOAT32, "adapter") else "peers.py"
    task_file = WORK / f"{name}.task.json"
    output = WORK / f"{name}.result.json"
    log_file = WORK / f"{name}.log.txt"
    write_json(task_file, task)
    output.unlink(missing_ok=True)
    with log_file.open("w") as log:
        status = subprocess.run(
            [sys.executable, str(HERE / script), name, str(task_file), str(output)],
            env={**environment(), **limits},
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    if status != 0:
        sys.exit(
            f"{NAMES.get(name, name)} ended with status {status}; "
            f"{log_file} ends:\n{log_file.read_text()[-2000:]}"
        )
    result: Row = json.loads(output.read_text())
    return result


def environment() -> dict[str, str]:
    """Return the environment of every contestant: the same threads, no GPU, no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads()),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def threads() -> int:
    """Return the number of cores to use."""
    return int(os.environ.get(THREADS, len(os.sched_getaffinity(0))))
