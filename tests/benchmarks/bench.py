"""Compare speed, memory and losses of our training with TRL and PEFT, on one machine.

    python tests/benchmarks/bench.py [--rounds 2] [--steps 6] [--curve-steps 12] [--base ID]
    python tests/benchmarks/bench.py --quick [--base ID]

Each contestant runs in a fresh process on the CPU, one after the other. Speed is the number of real
tokens, without padding, over the time of steps 2 to --steps; step 1 warms up.

First, every contestant trains the main task in each of its dtypes for --curve-steps: this gives the
losses that are compared, and the dtype in which each competitor is fastest here. In that dtype it
then runs against ours, round after round. The benchmark computes ratios within a round and reports
their median, so a machine that slows down between rounds affects both sides equally. The other
tasks follow with one round each, and the main task restricted to AVX2. Nothing else should run at
the same time: the lowest fraction of the cores that a contestant got is reported.

In float32 the losses of all must be equal. In bfloat16 each way of computing rounds differently, so
ours must stay closer to the losses in float32 than the bare PEFT loop does.

TRL's packing needs FlashAttention, which no CPU has: without it, examples would see each other.

The results go to build/bench.json. A missed goal of speed or memory is reported; losses that differ
are an error, also with --quick, which takes two steps and skips most tasks.
"""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from statistics import median

import torch
from contestants import (
    AVX2,
    NAMES,
    OURS,
    OURS_FLOAT32,
    PEFT,
    PEFT_BFLOAT16,
    PEFT_FLOAT32,
    THREADS,
    TRL,
    TRL_BFLOAT16,
    TRL_FLOAT32,
    TRL_FLOAT32_ADAPTER,
    Figures,
    run_all,
)
from rows import BUILD, Row, console, differing, report, result_file, row
from scenarios import FULL, MAIN, OTHERS, Scenario, prepare

from lora_core.files import write_json

RESULT = BUILD / "bench.json"
BASE = "embedded:SmolLM2-135M-Instruct"
FLOAT32 = (OURS_FLOAT32, PEFT_FLOAT32, TRL_FLOAT32_ADAPTER, TRL_FLOAT32)
BFLOAT16 = (OURS, PEFT_BFLOAT16, TRL_BFLOAT16)
"""Contestants of machines on which ours chooses bfloat16."""
VARIANTS = {
    PEFT: (PEFT_FLOAT32, PEFT_BFLOAT16),
    TRL: (TRL_FLOAT32, TRL_BFLOAT16, TRL_FLOAT32_ADAPTER),
}
"""Competitor → its dtypes."""
Best = dict[str, str]
"""Competitor → the variant that is fastest here."""


def main() -> int:
    """Prepare, run the contestants, write and print the results."""
    options = parse_options()
    if options.quick:
        os.environ[THREADS] = "1"  # other tests run at the same time
    task = prepare(MAIN, options.base, batch_size=2 if options.quick else None)
    is_bfloat16 = task["inputs"]["training"]["dtype"] == "bfloat16"
    console.print(f"Losses, {options.curve_steps} steps", style="bold")
    names = FLOAT32 + BFLOAT16 if is_bfloat16 else (*FLOAT32, OURS)
    if options.quick:
        names = tuple(name for name in names if name not in (TRL_FLOAT32, TRL_BFLOAT16))
    steps = dict.fromkeys(names, options.curve_steps)
    curves = run_all(names, {**task, "products": True}, steps, timed=options.steps)
    found = loss_rows(curves) + variant_rows(curves, options.steps)
    best = fastest(curves, options.steps)
    rounds = [curves] if options.quick else run_rounds(task, best, options)
    found += main_rows(rounds, best, options.steps)
    for scenario in (FULL,) if options.quick else OTHERS:
        found += other_rows(scenario, best, options)
    if has_wider_units() and not options.quick:
        found += avx2_rows(task, options)
    write_json(result_file(RESULT, quick=options.quick), found)
    report(found, "Training speed, memory and losses")
    return 1 if differing(found) else 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contestant")
    parser.add_argument("--steps", type=int, default=6, help="steps; the first one is not timed")
    parser.add_argument("--curve-steps", type=int, default=12, help="steps whose losses count")
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


def fastest(curves: dict[str, Figures], steps: int) -> Best:
    """Return each competitor's variant with the highest speed."""
    best = {}
    for competitor, variants in VARIANTS.items():
        measured = [name for name in variants if name in curves]
        best[competitor] = max(measured, key=lambda name: curves[name].tokens_per_second(steps))
    return best


def loss_rows(curves: dict[str, Figures]) -> list[Row]:
    """Return how far losses are from each other in float32, and from float32 in bfloat16."""
    exact = curves[OURS_FLOAT32]
    rows = [row("steps whose losses are compared", "steps", len(exact.losses))]
    for name, label in ((PEFT_FLOAT32, "bare PEFT loop"), (TRL_FLOAT32_ADAPTER, "TRL")):
        difference = loss_difference(exact, curves[name])
        what = f"float32: ours − {label}, largest difference of loss"
        rows.append(row(what, "nats", difference, at_most=1e-4))
    if PEFT_BFLOAT16 in curves:
        noise = loss_difference(exact, curves[PEFT_BFLOAT16])
        rows.append(row("bfloat16 − float32: bare PEFT loop, largest difference", "", noise))
        what = "bfloat16 − float32: ours, largest difference of loss"
        rows.append(row(what, "nats", loss_difference(exact, curves[OURS]), at_most=noise))
    return rows


def variant_rows(curves: dict[str, Figures], steps: int) -> list[Row]:
    """Return the speed of every dtype of every contestant."""
    return [
        row(f"{NAMES[name]}: speed with the losses", "tokens/s", figures.tokens_per_second(steps))
        for name, figures in curves.items()
    ]


def run_rounds(task: Row, best: Best, options: argparse.Namespace) -> list[dict[str, Figures]]:
    """Run the main task round after round, each in another order."""
    names = (OURS, best[PEFT], best[TRL])
    rounds = []
    for number in range(options.rounds):
        console.print(f"{MAIN.name}, round {number + 1}", style="bold")
        order = random.Random(number).sample(names, len(names))
        measured = {**task, "products": True}
        steps = dict.fromkeys(names, options.steps)
        rounds.append(run_all(order, measured, steps, timed=options.steps))
    return rounds


def main_rows(rounds: Sequence[dict[str, Figures]], best: Best, steps: int) -> list[Row]:
    """Return speed, memory and the share of products in the main task."""
    found = speed_rows("", rounds, best, steps, goals={PEFT: 2.0, TRL: 3.0})
    names = (OURS, *best.values())
    peaks = {name: max(one[name].peak_gib(steps) for one in rounds) for name in names}
    found.append(row("ours: peak memory", "GiB", peaks[OURS]))
    found += [row(f"{peer}: peak memory", "GiB", peaks[best[peer]]) for peer in best]
    ratio = peaks[OURS] / peaks[best[TRL]]
    found.append(row("ours / TRL: peak memory", "×", ratio, at_most=0.6))
    shares = [product_share(one[OURS]) for one in rounds]
    what = "matrix products of a step alone / the step"
    found.append(row(what, "×", median(shares), at_least=0.75))
    cores = [one.core_share(steps) for each in rounds for one in each.values()]
    # Below the goal, other processes were running.
    what = "lowest share of the cores that a contestant had"
    found.append(row(what, "", min(cores), at_least=0.8))
    return found


def other_rows(scenario: Scenario, best: Best, options: argparse.Namespace) -> list[Row]:
    """Run another task once; return speed and memory relative to the competitors."""
    console.print(scenario.name, style="bold")
    task = prepare(scenario, options.base, batch_size=2 if options.quick else None)
    names = (OURS, best[TRL]) if scenario.full else (OURS, best[PEFT], best[TRL])
    steps = 2 if options.quick else 4
    figures = run_all(names, task, dict.fromkeys(names, steps), timed=steps)
    peers = {peer: name for peer, name in best.items() if name in names}
    goals = dict.fromkeys(peers, scenario.least_ratio)
    found = speed_rows(f"{scenario.name}: ", [figures], peers, steps, goals=goals)
    for peer, name in peers.items():
        ratio = figures[OURS].peak_gib(steps) / figures[name].peak_gib(steps)
        found.append(row(f"{scenario.name}: ours / {peer}: peak memory", "×", ratio))
    return found


def avx2_rows(task: Row, options: argparse.Namespace) -> list[Row]:
    """Run the main task restricted to AVX2, where nothing multiplies bfloat16 fast."""
    console.print(f"{MAIN.name}, restricted to AVX2", style="bold")
    peers = {PEFT: PEFT_FLOAT32, TRL: TRL_FLOAT32}
    names = (OURS_FLOAT32, *peers.values())
    steps = dict.fromkeys(names, options.steps)
    rounds = [
        run_all(names, task, steps, timed=options.steps, limits=AVX2) for _ in range(options.rounds)
    ]
    goals = {PEFT: 1.6, TRL: 3.6}
    return speed_rows("AVX2: ", rounds, peers, options.steps, goals=goals, ours=OURS_FLOAT32)


def speed_rows(
    prefix: str,
    rounds: Sequence[dict[str, Figures]],
    peers: Best,
    steps: int,
    *,
    goals: dict[str, float],
    ours: str = OURS,
) -> list[Row]:
    """Return speeds, and ours relative to each competitor's in the same round."""
    speeds = {
        name: [one[name].tokens_per_second(steps) for one in rounds]
        for name in (ours, *peers.values())
    }
    found = [row(f"{prefix}ours: speed", "tokens/s", median(speeds[ours]))]
    for peer, name in peers.items():
        found.append(row(f"{prefix}{name}: speed", "tokens/s", median(speeds[name])))
        ratio = median(a / b for a, b in zip(speeds[ours], speeds[name], strict=True))
        found.append(row(f"{prefix}ours / {peer}: speed", "×", ratio, at_least=goals[peer]))
    return found


def product_share(figures: Figures) -> float:
    """Return the time of a step's matrix products alone relative to the step."""
    assert figures.products_seconds is not None, "the task asks for it"
    return figures.products_seconds / figures.last_step_seconds


def has_wider_units() -> bool:
    """Return whether PyTorch detects more than AVX2 on this machine."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def loss_difference(one: Figures, other: Figures) -> float:
    """Return the largest absolute difference between two curves of losses."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


if __name__ == "__main__":
    sys.exit(main())
