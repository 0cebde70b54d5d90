"""Compare speed, memory and losses of our training with TRL and PEFT, on one task and machine.

    python tests/benchmarks/bench.py [--rounds 2] [--steps 6] [--curve-steps 20] [--base ID]
    python tests/benchmarks/bench.py --quick [--base ID]

Each contestant runs in a fresh process on the CPU, one after the other, round after round. Speed is
the number of real tokens, without padding, over the time of steps 2 to --steps; step 1 warms up.
The benchmark computes ratios within a round and reports their median, so a machine that slows down
between rounds affects both sides equally. In the first round, the contestants whose losses are
compared continue to --curve-steps. Nothing else should run at the same time: the fraction of the
cores that each contestant got is reported.

SFTTrainer converts the adapter over a 4-bit base to bfloat16, which is slow on cores with AVX2 only
and fast on cores with bfloat16 units; the goal was set on the former. If the cores have more than
AVX2, the benchmark runs pairs of ours and TRL again with all libraries restricted to AVX2, and the
goal applies to these; both ratios are reported.

The results go to build/bench.json. A missed goal of speed or memory is reported; losses that differ
are an error, also with --quick, which compares two steps of each contestant.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_core.files import write_json
from pipelines.config.experiments import rank_experiments
from pipelines.config.recipe import parse_recipe
from pipelines.paths import runs_root
from pipelines.runtime.launcher import ensure_result
from pipelines.workflow.stages import PreparedData, Stages

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"
WORK, RESULT = BUILD / "bench", BUILD / "bench.json"
SCRIPTS = {"ours": "ours.py", "peft": "peers.py", "trl": "peers.py", "trl-float32": "peers.py"}
NAMES = {
    "ours": "ours",
    "peft": "bare PEFT loop",
    "trl": "TRL",
    "trl-float32": "TRL, float32 adapter",
}
TIMED = ("ours", "peft", "trl")
"""Contestants of every round; SFTTrainer is timed with the bfloat16 adapter that it creates."""
COMPARED = ("ours", "peft", "trl-float32")
"""Contestants whose losses are compared in the first round; bfloat16 would round them away."""
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Environment in which PyTorch and its libraries use no units wider than AVX2."""
USUAL_SPEED = {"ours": 170.0, "peft": 100.0, "trl": 100.0, "trl-float32": 95.0}
"""Tokens per second on two idle cores, only to estimate the duration."""
USUAL_START = 20.0
"""Seconds to import and load."""
GIB = 2**30
RANK = 16
BASE = "embedded:SmolLM2-135M-Instruct"
THREADS = "BENCH_THREADS"
"""Environment variable with the number of cores to use; all by default."""
RECIPE: dict[str, Any] = {
    "name": "bench",
    "data": {"source": "docstrings", "max_source_characters": 250, "max_tokens": 320},
    "lora": {"ranks": [RANK], "alpha": 2 * RANK, "learning_rate": 1e-3},
    "training": {
        "steps": 20,  # each contestant decays its learning rate over the steps that it takes
        "warmup_steps": 0,
        "max_grad_norm": 1e9,  # never clips
    },
    "registry": {"model": "bench"},
}

Row = dict[str, Any]
NO_LIMITS: Mapping[str, str] = {}
console = Console()


@dataclass(frozen=True)
class Figures:
    """What one run of a contestant reports, step by step."""

    losses: list[float]
    ends: list[dict[str, float]]
    tokens: list[int]

    def tokens_per_second(self, steps: int) -> float:
        """Return the speed of steps 2 to `steps`."""
        return sum(self.tokens[1:steps]) / self._passed("clock", steps)

    def core_share(self, steps: int) -> float:
        """Return the fraction of the machine's cores that the contestant had in these steps."""
        return self._passed("cores", steps) / self._passed("clock", steps) / threads()

    def peak_gib(self, steps: int) -> float:
        """Return the peak of resident memory in the first `steps` steps."""
        return self.ends[steps - 1]["peak"] / GIB

    def _passed(self, clock: str, steps: int) -> float:
        return self.ends[steps - 1][clock] - self.ends[0][clock]


Rounds = list[dict[str, Figures]]
"""Contestant → measurements, round by round."""


def main() -> int:
    """Prepare, run the contestants, write and print the results."""
    options = parse_options()
    if options.quick:
        os.environ[THREADS] = "1"  # other tests run at the same time
    task, tokens_per_step = prepare(options.base, batch_size=2 if options.quick else 8)
    plans = [plan_round(number, options) for number in range(options.rounds)]
    pairs = []
    if has_wider_units() and not options.quick:
        pairs = [{"ours": options.steps, "trl": options.steps} for _ in plans]
    minutes = sum(expected_seconds(plan, tokens_per_step) for plan in [*plans, *pairs]) / 60
    console.print(
        f"{options.rounds} rounds, about {minutes:.0f} minutes on two idle cores", style="bold"
    )
    rounds = [run_round(plan, task, options.steps) for plan in plans]
    held = [run_round(pair, task, options.steps, AVX2) for pair in pairs]
    found = rows(rounds, options.steps) + ratios_to_trl(rounds, held, options.steps)
    write_json(result_file(RESULT, quick=options.quick), found)
    report(found)
    return 1 if differing(found) else 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contestant")
    parser.add_argument(
        "--steps", type=int, default=6, help="number of steps; the first one is not timed"
    )
    parser.add_argument(
        "--curve-steps", type=int, default=20, help="steps whose losses are compared"
    )
    parser.add_argument("--base", default=BASE, help="a hub id, a folder or a .gguf file")
    parser.add_argument("--quick", action="store_true", help="one round of two steps")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.curve_steps = 1, 2, 2
    if options.rounds < 1 or options.steps < 2:
        parser.error("the first step warms up and is not timed: give at least 1 round and 2 steps")
    if options.curve_steps < options.steps:
        parser.error(
            f"--curve-steps {options.curve_steps} is less than --steps {options.steps}; "
            "the compared runs are timed too"
        )
    return options


def prepare(base_id: str, *, batch_size: int) -> tuple[Row, float]:
    """Prepare base and data if needed; return the common task and its mean tokens per step."""
    training_section = {**RECIPE["training"], "batch_size": batch_size}
    base_section = {"id": base_id, "quantization": "nf4"}
    sections = {**RECIPE, "base_model": base_section, "training": training_section}
    recipe = parse_recipe(sections)
    stages = Stages(recipe, runs_root())
    base = ensure_result(stages.base(), threads=threads())
    data_stage = stages.data(base)
    data = ensure_result(data_stage, threads=threads())
    [experiment] = rank_experiments(recipe)
    training = stages.train(base, PreparedData(data_stage, data), experiment)
    task = {
        "inputs": training.inputs.plain(),
        "paths": training.paths.plain() | {"adapter": str(WORK / "adapter")},
    }
    run("ours.py", "adapter", {**task, "steps": 1})
    tokens_per_example = data.train_tokens / data.train_examples
    return task, tokens_per_example * training.inputs.training.batch_size


def plan_round(number: int, options: argparse.Namespace) -> dict[str, int]:
    """Return the number of steps of each contestant of a round, in a random order."""
    steps = dict.fromkeys(TIMED, options.steps)
    if number == 0:
        steps |= dict.fromkeys(COMPARED, options.curve_steps)
    return {name: steps[name] for name in random.Random(number).sample(list(steps), len(steps))}


def expected_seconds(plan: dict[str, int], tokens_per_step: float) -> float:
    """Estimate how long a round takes."""
    return sum(
        USUAL_START + steps * tokens_per_step / USUAL_SPEED[name] for name, steps in plan.items()
    )


def run_round(
    plan: dict[str, int], task: Row, timed: int, limits: Mapping[str, str] = NO_LIMITS
) -> dict[str, Figures]:
    """Run the contestants of a round under `limits` and print their speed."""
    found = {}
    for name, steps in plan.items():
        found[name] = one = Figures(**run(SCRIPTS[name], name, {**task, "steps": steps}, limits))
        label = NAMES[name] + ", on AVX2" * bool(limits)
        speed = one.tokens_per_second(timed)
        fraction = one.core_share(timed)
        console.print(
            f"{label:<22}{speed:8.1f} tokens/s {one.peak_gib(timed):6.2f} GiB "
            f"{fraction:6.0%} of the cores",
            highlight=False,
        )
    return found


def run(script: str, name: str, task: Row, limits: Mapping[str, str] = NO_LIMITS) -> Row:
    """Run one contestant in a fresh process and return what it reported.

    Raises:
        SystemExit: it failed; the error contains the end of its output.
    """
    task_file, result_file, log_file = (
        WORK / f"{name}.{ending}" for ending in ("task.json", "result.json", "log.txt")
    )
    write_json(task_file, task)
    result_file.unlink(missing_ok=True)
    with log_file.open("w") as log:
        argv = [sys.executable, str(HERE / script), name, str(task_file), str(result_file)]
        status = subprocess.run(
            argv, env={**environment(), **limits}, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    if status != 0:
        sys.exit(
            f"{NAMES.get(name, name)} ended with status {status}; "
            f"{log_file} ends:\n{log_file.read_text()[-2000:]}"
        )
    result: Row = json.loads(result_file.read_text())
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


def rows(rounds: Rounds, steps: int) -> list[Row]:
    """Turn the rounds into rows, each with a goal or without one."""
    speeds = {
        name: [r[name].tokens_per_second(steps) for r in rounds if name in r] for name in SCRIPTS
    }
    peaks = {name: max(r[name].peak_gib(steps) for r in rounds if name in r) for name in SCRIPTS}
    shares = [figures.core_share(steps) for r in rounds for figures in r.values()]
    return [
        *[
            row(f"{NAMES[name]}: speed", "tokens/s", median(values))
            for name, values in speeds.items()
        ],
        row(
            "ours / TRL, float32 adapter: speed, first round",
            "×",
            speeds["ours"][0] / speeds["trl-float32"][0],
        ),
        row("ours / bare PEFT loop: speed", "×", median_ratio(speeds, "peft"), at_least=1.2),
        *[row(f"{NAMES[name]}: peak memory", "GiB", value) for name, value in peaks.items()],
        row("ours / TRL: peak memory", "×", peaks["ours"] / peaks["trl"], at_most=0.75),
        row(
            "ours − bare PEFT loop: largest difference of loss",
            "nats",
            loss_difference(rounds[0], "peft"),
            at_most=1e-3,
        ),
        row(
            "ours − TRL, float32 adapter: largest difference of loss",
            "nats",
            loss_difference(rounds[0], "trl-float32"),
            at_most=1e-3,
        ),
        row("steps whose losses are compared", "steps", len(rounds[0]["ours"].losses)),
        # Below the goal, other processes were running.
        row("lowest share of the cores that a contestant had", "", min(shares), at_least=0.8),
    ]


def result_file(file: Path, *, quick: bool) -> Path:
    """Return where results go; those of a quick run do not replace the others."""
    return file.with_stem(f"{file.stem}_quick") if quick else file


def differing(found: list[Row]) -> list[str]:
    """Return the rows of numbers that must agree and do not; speed and memory may miss a goal."""
    exact = ("nats", "items", "choices")
    return [one["what"] for one in found if one["unit"] in exact and one["holds"] is False]


def has_wider_units() -> bool:
    """Return whether PyTorch detects more than AVX2 on this machine."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def ratios_to_trl(rounds: Rounds, held: Rounds, steps: int) -> list[Row]:
    """Return our speed relative to TRL's; the goal applies to the runs on AVX2."""

    def speeds(some: Rounds) -> dict[str, list[float]]:
        return {name: [r[name].tokens_per_second(steps) for r in some] for name in ("ours", "trl")}

    if not held:
        return [row("ours / TRL: speed", "×", median_ratio(speeds(rounds), "trl"), at_least=3.0)]
    return [
        *[
            row(f"{NAMES[name]}, on AVX2: speed", "tokens/s", median(values))
            for name, values in speeds(held).items()
        ],
        row(
            "ours / TRL, with all units of these cores: speed",
            "×",
            median_ratio(speeds(rounds), "trl"),
        ),
        row("ours / TRL, on AVX2: speed", "×", median_ratio(speeds(held), "trl"), at_least=3.0),
    ]


def row(
    what: str,
    unit: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Return one row; `holds` is null without a goal."""
    if at_least is not None:
        return {
            "what": what,
            "value": value,
            "unit": unit,
            "goal": f"≥ {at_least:g}",
            "holds": value >= at_least,
        }
    if at_most is not None:
        return {
            "what": what,
            "value": value,
            "unit": unit,
            "goal": f"≤ {at_most:g}",
            "holds": value <= at_most,
        }
    return {"what": what, "value": value, "unit": unit, "goal": None, "holds": None}


def median_ratio(speeds: dict[str, list[float]], other: str) -> float:
    """Return the median over rounds of our speed relative to another's in the same round."""
    return median(a / b for a, b in zip(speeds["ours"], speeds[other], strict=True))


def loss_difference(found: dict[str, Figures], other: str) -> float:
    """Return the largest absolute difference between our losses and another's, step by step."""
    return max(abs(a - b) for a, b in zip(found["ours"].losses, found[other].losses, strict=True))


def report(found: list[Row], title: str = "Training speed, memory and losses") -> None:
    """Print the rows and the missed goals."""
    table = Table("figure", "value", "unit", "goal", "verdict", title=title, title_justify="left")
    for one in found:
        verdict = {None: "", True: "[green]holds[/green]", False: "[red]missed[/red]"}[one["holds"]]
        table.add_row(one["what"], f"{one['value']:.4g}", one["unit"], one["goal"] or "", verdict)
    console.print(table)
    missed = [one["what"] for one in found if one["holds"] is False]
    console.print(
        f"goals missed: {'; '.join(missed)}" if missed else "all goals hold",
        style="red" if missed else "green",
    )


if __name__ == "__main__":
    sys.exit(main())
