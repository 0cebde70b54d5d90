"""Measure speed, memory and losses of our training beside TRL's and PEFT's, on the same task and the same machine.

    python tests/benchmarks/bench.py [--rounds 3] [--steps 6] [--curve-steps 20]

Each contestant runs in a fresh process on the CPU, one after the other. The first round takes --curve-steps steps,
whose losses are compared; the others take --steps. Speed is what counts: real tokens, without padding, over the time of
all steps but the first. Ratios are taken within a round and their median is reported, so a machine that slows down
between rounds slows both sides. The figures go to build/bench.json; a goal that is missed is said, and is no error.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_core.files import write_json
from pipelines.launch import python_argv, run_child
from pipelines.recipe import parse_recipe
from pipelines.stage import Stage
from pipelines.stages import Stages, runs_root

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"
WORK, RESULT = BUILD / "bench", BUILD / "bench.json"
SCRIPTS = {"ours": "ours.py", "peft": "peers.py", "trl": "peers.py", "trl-float32": "peers.py"}
NAMES = {"ours": "ours", "peft": "bare PEFT loop", "trl": "TRL", "trl-float32": "TRL, float32 adapter"}
USUAL_SPEED = {"ours": 120.0, "peft": 95.0, "trl": 45.0, "trl-float32": 80.0}
"""Tokens a second on two AVX2 cores; they give the expected duration and nothing else."""
USUAL_START = 20.0
"""Seconds to import and load."""
GIB = 2**30
RANK = 16
RECIPE = {
    "name": "bench",
    "base_model": {"id": "embedded:SmolLM2-135M-Instruct", "quantization": "nf4"},
    "data": {"source": "docstrings", "max_source_characters": 250, "max_tokens": 320},
    "lora": {"ranks": [RANK], "alpha": 2 * RANK, "learning_rate": 1e-3},
    "training": {
        "steps": 10**9,  # length of the schedule, of which the first steps all stand at the peak rate
        "batch_size": 8,
        "warmup_steps": 0,
        "max_grad_norm": 1e9,  # clips nothing
    },
    "registry": {"model": "bench"},
}

Row = dict[str, Any]
console = Console()


@dataclass(frozen=True)
class Figures:
    """What one run of a contestant reported."""

    losses: list[float]
    tokens: int
    seconds: float
    peak_memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


Rounds = list[dict[str, Figures]]
"""Contestant → figures, round by round."""


def main() -> None:
    """Prepare, let the contestants run, write and print the figures."""
    options = parse_options()
    steps = [options.curve_steps, *[options.steps] * (options.rounds - 1)]
    task, tokens_per_step = prepare()
    console.print(
        f"{options.rounds} rounds of {steps} steps; about {expected_seconds(steps, tokens_per_step) / 60:.0f} minutes", style="bold"
    )
    rounds = [run_round(number, count, task) for number, count in enumerate(steps, start=1)]
    found = rows(rounds)
    write_json(RESULT, found)
    report(found)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant")
    parser.add_argument("--steps", type=int, default=6, help="steps of the rounds after the first; at least 2")
    parser.add_argument("--curve-steps", type=int, default=20, help="steps of the first round, whose losses are compared; at least 2")
    options = parser.parse_args()
    if options.rounds < 1 or min(options.steps, options.curve_steps) < 2:
        parser.error("the first step warms up and is not timed: give at least 1 round and 2 steps")
    return options


def prepare() -> tuple[Row, float]:
    """Bring base and data into place, where they are not yet; return the common task and its mean tokens in a step."""
    stages = Stages(parse_recipe(RECIPE), runs_root())
    base = figures_of(stages.base(), "pipelines.base_model")
    data_stage = stages.data(base)
    data = figures_of(data_stage, "pipelines.data")
    training = stages.train(base, (data_stage, data), RANK)
    task = {"inputs": dict(training.inputs), "paths": {**training.paths, "adapter": str(WORK / "adapter")}}
    run("ours.py", "adapter", {**task, "steps": 1})
    return task, data["train_tokens"] / data["train_examples"] * training.inputs["training"]["batch_size"]


def figures_of(stage: Stage, module: str) -> Row:
    """Return the figures of a finished stage; run it first where it is not finished."""
    done = stage.result()
    if done is None:
        console.print(f"preparing: {stage.kind} {stage.label}")
        done = run_child(stage, python_argv(module, stage.begin()), threads=threads())
    return done


def expected_seconds(steps: list[int], tokens_per_step: float) -> float:
    """Estimate how long all rounds take together."""
    a_step = sum(tokens_per_step / speed for speed in USUAL_SPEED.values())
    return sum(count * a_step + USUAL_START * len(USUAL_SPEED) for count in steps)


def run_round(number: int, steps: int, task: Row) -> dict[str, Figures]:
    """Run every contestant once, in an order drawn for this round."""
    names = random.Random(number).sample(list(SCRIPTS), len(SCRIPTS))
    found = {}
    for name in names:
        found[name] = Figures(**run(SCRIPTS[name], name, {**task, "steps": steps}))
        peak = found[name].peak_memory_bytes / GIB
        console.print(f"round {number}  {NAMES[name]:<22}{found[name].tokens_per_second:8.1f} tokens/s  {peak:6.2f} GiB")
    return found


def run(script: str, name: str, task: Row) -> Row:
    """Run one contestant in a fresh process and return what it reported.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    task_file, result_file, log_file = (WORK / f"{name}.{ending}" for ending in ("task.json", "result.json", "log.txt"))
    write_json(task_file, task)
    result_file.unlink(missing_ok=True)
    with log_file.open("w") as log:
        argv = [sys.executable, str(HERE / script), name, str(task_file), str(result_file)]
        status = subprocess.run(argv, env=environment(), stdout=log, stderr=subprocess.STDOUT).returncode
    if status != 0:
        sys.exit(f"{NAMES.get(name, name)} ended with status {status}; {log_file} ends:\n{log_file.read_text()[-2000:]}")
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
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0))


def rows(rounds: Rounds) -> list[Row]:
    """Turn the rounds into rows, each with a goal or without one."""
    first = rounds[0]
    return [
        *[row(f"{NAMES[name]}: speed", "tokens/s", median(r[name].tokens_per_second for r in rounds)) for name in SCRIPTS],
        row("speed, ours / TRL", "×", speed_ratio(rounds, "trl"), at_least=3.0),
        row("speed, ours / TRL, float32 adapter", "×", speed_ratio(rounds, "trl-float32")),
        row("speed, ours / bare PEFT loop", "×", speed_ratio(rounds, "peft"), at_least=1.2),
        *[row(f"{NAMES[name]}: peak memory", "GiB", peak(rounds, name) / GIB) for name in SCRIPTS],
        row("peak memory, ours / TRL", "×", peak(rounds, "ours") / peak(rounds, "trl"), at_most=0.75),
        row("largest difference of loss, ours and bare PEFT loop", "nats", loss_difference(first, "peft"), at_most=1e-3),
        row("largest difference of loss, ours and TRL, float32 adapter", "nats", loss_difference(first, "trl-float32"), at_most=1e-3),
        row("largest difference of loss, ours and TRL", "nats", loss_difference(first, "trl")),
        row("steps of the compared losses", "steps", len(first["ours"].losses)),
    ]


def row(what: str, unit: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> Row:
    """Return one row; `holds` is null where there is no goal."""
    if at_least is not None:
        return {"what": what, "value": value, "unit": unit, "goal": f"≥ {at_least:g}", "holds": value >= at_least}
    if at_most is not None:
        return {"what": what, "value": value, "unit": unit, "goal": f"≤ {at_most:g}", "holds": value <= at_most}
    return {"what": what, "value": value, "unit": unit, "goal": None, "holds": None}


def speed_ratio(rounds: Rounds, other: str) -> float:
    """Return the median over rounds of our speed against another's."""
    return median(r["ours"].tokens_per_second / r[other].tokens_per_second for r in rounds)


def peak(rounds: Rounds, name: str) -> float:
    """Return the highest peak of memory of a contestant, in bytes."""
    return max(r[name].peak_memory_bytes for r in rounds)


def loss_difference(found: dict[str, Figures], other: str) -> float:
    """Return the largest absolute difference between our losses and another's, step by step."""
    return max(abs(a - b) for a, b in zip(found["ours"].losses, found[other].losses, strict=True))


def report(found: list[Row]) -> None:
    """Print the rows and, plainly, how many goals were missed."""
    table = Table("figure", "value", "unit", "goal", "", title="Training speed, memory and losses", title_justify="left")
    for one in found:
        verdict = {None: "", True: "[green]holds[/green]", False: "[red]missed[/red]"}[one["holds"]]
        table.add_row(one["what"], f"{one['value']:.4g}", one["unit"], one["goal"] or "", verdict)
    console.print(table)
    missed = [one["what"] for one in found if one["holds"] is False]
    console.print(f"goals missed: {'; '.join(missed)}" if missed else "all goals hold", style="red" if missed else "green")


if __name__ == "__main__":
    main()
