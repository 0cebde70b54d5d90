"""Measure how fast this CPU multiplies in float32 and in bfloat16, to choose the training's dtype.

    python -m pipelines.models.processor STAGE_FOLDER

A processor with units for bfloat16 (AVX512-BF16, AMX, Arm's BF16) multiplies up to several times
as fast in it. Whether it does so here also depends on PyTorch and its libraries, so that the names
of the units are not enough. Without such units bfloat16 is 30 to 60 times slower, and nothing is
measured. `identify_processor` needs no torch, since its result is part of a stage's key.
"""

import os
import platform
import time
from pathlib import Path

from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import ProcessorInputs, StagePaths
from pipelines.runtime.interfaces.kinds import PROCESSOR
from pipelines.runtime.interfaces.results import ProcessorResult

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_UNITS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of Linux for units that multiply bfloat16 (x86-64, x86-64, Arm)."""
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables by which the user limits the units that PyTorch and its libraries use."""
ROWS, COLUMNS = 512, 1024
"""A product of (ROWS, COLUMNS) with (COLUMNS, COLUMNS): the size of a small model's layer."""
SECONDS = 0.25
"""Duration of the measurement of one dtype."""


def identify_processor(cpu_info: Path = CPU_INFO) -> ProcessorInputs:
    """Return what determines the measurement: the processor, its units and the user's limits.

    Args:
        cpu_info: the kernel's description; where it does not exist, no units are known.
    """
    model = platform.machine()
    units = set[str]()
    if cpu_info.is_file():
        for line in cpu_info.read_text().splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            if name == "model name":
                model = value
            if name in ("flags", "Features"):
                units |= BFLOAT16_UNITS & set(value.split())
    limits = {name: os.environ[name] for name in LIMITS if name in os.environ}
    return ProcessorInputs(model=model, units=tuple(sorted(units)), limits=limits)


def measure(
    folder: Path, inputs: ProcessorInputs, paths: StagePaths
) -> tuple[ProcessorResult, list[str]]:
    """Return the speed of products in both dtypes.

    Args:
        folder: of the stage; nothing is written into it.
        inputs: the processor.
        paths: of nothing.
    """
    import torch

    dtypes = (torch.float32, torch.bfloat16)
    pairs = {}
    for dtype in dtypes:
        pairs[dtype] = (
            torch.randn(ROWS, COLUMNS).to(dtype),
            torch.randn(COLUMNS, COLUMNS).to(dtype),
        )
    shortest = dict.fromkeys(dtypes, float("inf"))
    end = time.perf_counter() + len(dtypes) * SECONDS
    while time.perf_counter() < end:  # in turn, so that other work disturbs both
        for dtype, (a, b) in pairs.items():
            started = time.perf_counter()
            torch.mm(a, b)
            shortest[dtype] = min(shortest[dtype], time.perf_counter() - started)
    operations = 2 * ROWS * COLUMNS * COLUMNS / 1e9
    return ProcessorResult(
        float32_gflops=round(operations / shortest[torch.float32], 1),
        bfloat16_gflops=round(operations / shortest[torch.bfloat16], 1),
    ), []


if __name__ == "__main__":
    execute_stage(PROCESSOR, measure)
