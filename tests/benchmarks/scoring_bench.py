"""Compare the speed of scoring with lm-eval's `hf` model, on the same weights, items and tokens.

    python tests/benchmarks/scoring_bench.py [--base FOLDER] [--items 30] [--rounds 3]
                                             [--batches 1 4 8 16]

Both score every choice of the embedded benchmarks' sample in float32 on the CPU, alternating in one
process. In the first round lm-eval runs with each batch size; the fastest one runs in the others.
The benchmark computes ratios within a round and reports their median, so a machine that slows down
between rounds affects both sides equally. Nothing else should run at the same time: the lowest
fraction of the cores that either side got is reported.

The results go to build/scoring_bench.json. A missed goal is reported and is not an error. Requires
`pip install lora-pipeline[lm-eval]`.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contestants import THREADS, threads
from rows import BUILD, Row, console, differing, report, result_file, row
from scoring_together import together_rows
from transformers import AutoModelForCausalLM

from lora_core.files import write_json
from pipelines.evaluation.benchmarks import READERS, sample
from pipelines.evaluation.items import Item
from pipelines.evaluation.questions import tokenize
from pipelines.evaluation.scoring import score
from pipelines.evaluation.trees import Tree
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model
from pipelines.models.tokenizer import load_tokenizer
from pipelines.paths import runs_root
from pipelines.planning.plan import meta_model
from pipelines.runtime.launcher import ensure_result
from pipelines.workflow.stages import base_stage

BASE = "embedded:SmolLM2-135M-Instruct"
SEED = 7
RESULT = BUILD / "scoring_bench.json"
NATS = 2e-3
"""Tolerance for float32 sums of a hundred log-likelihoods with differently blocked products."""
Scores = list[tuple[float, bool]]
"""For each choice its log-likelihood and whether it is greedy."""
Contestant = Callable[[], Scores]


@dataclass(frozen=True)
class ScoringRun:
    """One run of a contestant."""

    scores: Scores
    seconds: float
    core_share: float
    """Fraction of the machine's cores that it had."""


def main() -> int:
    """Run both, write and print the results."""
    options = parse_options()
    if find_spec("lm_eval") is None:
        sys.exit("lm-eval is not installed; run: pip install 'lora-pipeline[lm-eval]'")
    torch.set_num_threads(threads())
    base = options.base or Path(
        ensure_result(base_stage(BASE, None, runs_root()), threads=threads()).folder
    )
    items = [item for name in READERS for item in sample(name, options.items, SEED)]
    console.print(f"{len(items)} items, {threads()} cores", style="bold")
    ours, theirs = contestants(base, items, options.batches)
    rounds = list(run_rounds(ours, theirs, options.rounds))
    trees = [question.tree for question in tokenize(items, load_tokenizer(base), None)]
    spared = row(
        "arithmetic of lm-eval / ours, without its padding",
        "×",
        arithmetic_ratio(base, items, trees),
    )
    found = [*rows(items, rounds), spared, *together_rows(base, trees, options.rounds)]
    write_json(result_file(options.result, quick=options.quick), found)
    report(found, title="Scoring answers")
    return 1 if differing(found) else 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--base",
        type=Path,
        help="folder of a model in Hugging Face format; the embedded one when left out",
    )
    parser.add_argument("--items", type=int, default=30, help="items of each benchmark")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 4, 8, 16],
        help="batch sizes for lm-eval",
    )
    parser.add_argument("--result", type=Path, default=RESULT, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="two items per benchmark, one round")
    options = parser.parse_args()
    if options.quick:
        os.environ[THREADS] = "1"  # other tests run at the same time
        options.items, options.rounds, options.batches = 2, 1, [4]
    return options


def contestants(
    base: Path, items: Sequence[Item], batches: Sequence[int]
) -> tuple[Contestant, dict[str, Contestant]]:
    """Load the model for both; return ours, and theirs by batch size."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(base)
    model = load_model(base, "none", detect())
    plain = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    pairs = [
        (item.context + choice.lead, choice.scored) for item in items for choice in item.choices
    ]
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]

    def ours() -> Scores:
        trees = [question.tree for question in tokenize(items, tokenizer, None)]
        return [
            (one.log_likelihood, one.greedy)
            for scores in score(CheckedReader(model), trees)
            for one in scores
        ]

    def theirs(batch: int) -> Contestant:
        wrapped = HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=batch, device="cpu")
        return lambda: wrapped.loglikelihood(requests, disable_tqdm=True)

    return ours, {f"lm-eval hf, batch {batch}": theirs(batch) for batch in batches}


def arithmetic_ratio(base: Path, items: Sequence[Item], trees: Sequence[Tree]) -> float:
    """Return the multiplications of lm-eval relative to ours.

    lm-eval reads each answer with its context and applies the head at every position. The ratio
    bounds the possible speedup if products dominate the time; here they take 83 % by the profiler.
    """
    model, tokenizer = meta_model(str(base)), load_tokenizer(base)
    head = model.get_output_embeddings().weight.numel()  # type: ignore[operator, union-attr]
    body = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if "embed" not in name and "head" not in name
    )
    texts = [
        item.context + choice.lead + choice.scored for item in items for choice in item.choices
    ]
    theirs = sum(len(ids) - 1 for ids in tokenizer(texts).input_ids) * (body + head)
    read = sum(len(tree.tokens) for tree in trees)
    scored = sum(len(answer.targets) for tree in trees for answer in tree.answers)
    return theirs / (read * body + scored * head)


def run_rounds(ours: Contestant, theirs: dict[str, Contestant], rounds: int) -> Any:
    """Yield the runs of each round by name; after the first round, only the fastest of theirs."""
    best = list(theirs)
    for number in range(rounds):
        turns = {"ours": ours, **{name: theirs[name] for name in best}}
        order = list(turns) if number % 2 == 0 else list(reversed(turns))
        found = {name: run(name, turns[name]) for name in order}
        best = [min(best, key=lambda name: found[name].seconds)]
        yield found


def run(name: str, contestant: Contestant) -> ScoringRun:
    """Score everything with one contestant."""
    started = time.perf_counter()
    cores = sum(os.times()[:2])
    scores = contestant()
    seconds = time.perf_counter() - started
    share = (sum(os.times()[:2]) - cores) / seconds / threads()
    console.print(f"{name:<24}{seconds:8.1f} s {share:6.0%} of the cores", highlight=False)
    return ScoringRun(scores, seconds, share)


def rows(items: Sequence[Item], rounds: Sequence[dict[str, ScoringRun]]) -> list[Row]:
    """Turn the rounds into rows, each with a goal or without one."""
    first = rounds[0]
    best = min(
        (name for name in rounds[-1] if name != "ours"), key=lambda name: rounds[-1][name].seconds
    )
    last = rounds[-1]
    differences = [
        abs(a - b) for (a, _), (b, _) in zip(last["ours"].scores, last[best].scores, strict=True)
    ]
    greedy = sum(
        a != b for (_, a), (_, b) in zip(last["ours"].scores, last[best].scores, strict=True)
    )
    chosen = [picks(items, last[name].scores) for name in ("ours", best)]
    ratio = median(one[best].seconds / one["ours"].seconds for one in rounds)
    return [
        row("ours: speed", "items/s", len(items) / median(one["ours"].seconds for one in rounds)),
        *[
            row(f"{name}: speed", "items/s", len(items) / one.seconds)
            for name, one in first.items()
            if name not in ("ours", best)
        ],
        row(f"{best}: speed", "items/s", len(items) / median(one[best].seconds for one in rounds)),
        row(f"ours / {best}: speed", "×", ratio, at_least=3.0),
        row("largest difference of a log-likelihood", "nats", max(differences), at_most=NATS),
        row(
            "items whose likeliest choice differs",
            "items",
            sum(a != b for a, b in zip(*chosen, strict=True)),
            at_most=0,
        ),
        row("choices whose being greedy differs", "choices", greedy, at_most=0),
        row("accuracy, ours", "", accuracy(items, chosen[0])),
        row("accuracy, lm-eval", "", accuracy(items, chosen[1])),
        row(
            "lowest share of the cores",
            "",
            min(one.core_share for found in rounds for one in found.values()),
            at_least=0.8,
        ),
    ]


def picks(items: Sequence[Item], scores: Scores) -> list[int]:
    """Return the likeliest choice of each item."""
    left, found = iter(scores), []
    for item in items:
        likelihoods = [next(left)[0] for _ in item.choices]
        found.append(likelihoods.index(max(likelihoods)))
    return found


def accuracy(items: Sequence[Item], chosen: Sequence[int]) -> float:
    """Return the fraction of items whose likeliest choice is correct."""
    return sum(item.gold == pick for item, pick in zip(items, chosen, strict=True)) / len(items)


if __name__ == "__main__":
    sys.exit(main())
