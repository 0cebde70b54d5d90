"""Compare scoring several adapters in one pass over a shared base with one after the other.

One pass reads each question once for every adapter and computes the products with the frozen
weights together. One after the other, as in the pipeline, reads fuller packs of each. The answers
are equal.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from rows import Row, row

from lora_core import Bank, LoraConfig
from lora_core.bank.routing import TOKENS
from pipelines.evaluation.scoring import HEAD_ROWS, PACK_TOKENS, score, tree_pack
from pipelines.evaluation.trees import Tree, bin_pack
from pipelines.models.checked import CheckedReader
from pipelines.models.forward import PackReader
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model

ADAPTER = LoraConfig(r=16, lora_alpha=32)
NAMES = ("first", "second")
NATS = 2e-3


def together_rows(base: Path, trees: Sequence[Tree], rounds: int) -> Iterator[Row]:
    """Yield the speedup of one pass, and the largest difference between the two modes."""
    bank = bank_of_two(base)
    ratios, differences = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        apart = {name: scored_alone(bank, name, trees) for name in NAMES}
        middle = time.perf_counter()
        together = scored_together(bank, trees)
        ratios.append((middle - started) / (time.perf_counter() - middle))
        differences += [float((apart[name] - together[name]).abs().max()) for name in NAMES]
    yield row("two adapters in one pass / one after the other: speed", "×", median(ratios))
    yield row(
        "largest difference of an answer's log-likelihood between the two",
        "nats",
        max(differences),
        at_most=NATS,
    )


def bank_of_two(base: Path) -> Bank:
    """Return the base with two adapters that differ from it and from each other."""
    bank = Bank(load_model(base, "none", detect()))
    for number, name in enumerate(NAMES):
        bank.add(name, ADAPTER, seed=number)
        generator = torch.Generator().manual_seed(number)
        for parameter in bank.parameters(name):
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    bank.model.eval()
    return bank


def scored_alone(bank: Bank, name: str, trees: Sequence[Tree]) -> torch.Tensor:
    """Return the log-likelihood of each answer by one adapter, as the pipeline scores it."""
    with bank.using(name) as model:
        return torch.tensor(
            [one.log_likelihood for scores in score(CheckedReader(model), trees) for one in scores]
        )  # type: ignore[arg-type]


@torch.inference_mode()
def scored_together(bank: Bank, trees: Sequence[Tree]) -> dict[str, torch.Tensor]:
    """Return the same for each adapter; every pack is read once for all of them."""
    found: dict[tuple[str, int], list[float]] = {}
    for places in bin_pack(trees, PACK_TOKENS // len(NAMES)):
        keys = [(name, place) for name in NAMES for place in places]
        group = [trees[place] for _, place in keys]
        with bank.rows(
            [name for name, _ in keys], dim=TOKENS, lengths=[len(tree.tokens) for tree in group]
        ) as model:
            likelihoods, _ = PackReader.default(model).log_likelihoods(
                tree_pack(group, "cpu"), HEAD_ROWS
            )  # type: ignore[arg-type]
        counts = [len(answer.targets) for tree in group for answer in tree.answers]
        parts = iter(likelihoods.split(counts))
        for key, tree in zip(keys, group, strict=True):
            found[key] = [float(next(parts).sum()) for _ in tree.answers]
    return {
        name: torch.tensor([value for place in range(len(trees)) for value in found[name, place]])
        for name in NAMES
    }
