"""Check every causal language model family of transformers against the model's own forward.

    PYTHONPATH=tests python -m families [--quick] [NAME ...]

The comparison covers losses, gradients, trees and generated answers. Each family is measured in a
separate process with limited memory and time. `--quick` measures one family of each kind. The
results go to build/families.json. Returns 1 if a goal is missed: a family that is silently wrong,
that ends with a traceback, or that should be read in packs and is not.
"""

import argparse
import multiprocessing
import resource
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from parity.rows import Row, at_most, show_grid
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from families.configs import VARIANTS, families
from families.goals import EITHER, PACKED, QUICK
from families.measure import Measured, measure
from lora_core.files import write_json

RESULT = Path(__file__).resolve().parents[2] / "build" / "families.json"
MEMORY_BYTES, SECONDS = 8 << 30, 120
LOSS, GRADIENT, TREE = 2e-5, 5e-4, 5e-4
"""Nats per token, of a gradient's norm, nats per answer of up to 15 tokens: float32 tolerances
for models with such large weights."""
CRASHED = "crashed"


def main() -> int:
    """Measure, print and write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one family of each kind")
    parser.add_argument("--result", type=Path, default=RESULT, help="where the results go")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="families and variants; default: all"
    )
    options = parser.parse_args()
    names = options.names or (QUICK if options.quick else families())
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = dict(zip(names, pool.map(measured_apart, names), strict=True))
    rows = [row for name, one in found.items() for row in rows_of(name, one)]
    write_json(options.result, rows)
    show_grid(
        "Families read here and by their own forward",
        [row for row in rows if "unbuilt" not in row["what"]],
    )
    show_reasons(found)
    show_paths(found)
    missed = [row["what"] for row in rows if row["holds"] is False]
    print(f"{len(found)} families and variants; goals missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def measured_apart(name: str) -> Measured:
    """Measure a family in a separate process."""
    context = multiprocessing.get_context("fork")  # loads the libraries once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_into, args=(name, sender))
    process.start()
    sender.close()
    try:
        values = (
            receiver.recv()
            if receiver.poll(SECONDS)
            else {"path": CRASHED, "reason": f"no end after {SECONDS} s"}
        )
    except EOFError:
        values = {"path": CRASHED, "reason": "its process ended without a result"}
    process.kill()
    process.join()
    return Measured(**values)


def _measure_into(name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.set_verbosity_error()
    import torch

    torch.set_num_threads(1)
    try:
        measured = measure(name)
        values = {field.name: getattr(measured, field.name) for field in fields(measured)}
    except BaseException as error:  # noqa: BLE001 - the row reports any error
        values = {"path": CRASHED, "reason": f"{type(error).__name__}: {str(error).strip()[:160]}"}
    sender.send(values)


def rows_of(name: str, one: Measured) -> list[Row]:
    """Return a family's results; a refused or unbuilt family only has the row for its path."""
    wanted = (name in PACKED and not one.path.startswith("packed")) or (
        name in EITHER and not one.path.startswith(("packed", "one by one"))
    )
    what = f"{name} ({one.path})"
    right = {
        "what": f"{what}: right path",
        "value": 0 if wanted or one.path == CRASHED else 1,
        "unit": "",
        "goal": ">= 1",
    }
    rows: list[Row] = [{**right, "holds": bool(right["value"])}]
    if one.path.startswith(("packed", "one by one")):
        rows += [
            at_most(f"{what}: loss", one.loss, LOSS, "nats a token"),
            at_most(f"{what}: gradient", one.gradient, GRADIENT, "of its norm"),
            at_most(f"{what}: tree", one.tree, TREE, "nats"),
            at_most(f"{what}: other answers", one.answers, 0),
        ]
    return rows


def show_paths(found: dict[str, Measured]) -> None:
    """Print the number of families and the largest differences per path."""
    table = Table(
        "path",
        "families",
        "loss, nats/token",
        "gradient, of its norm",
        "tree, nats",
        "other answers",
        title="By path",
        title_justify="left",
    )
    for path, count in Counter(one.path for one in found.values()).most_common():
        some = [one for one in found.values() if one.path == path]
        figures = [
            f"{max(getattr(one, name) for one in some):.0e}"
            for name in ("loss", "gradient", "tree")
        ]
        measured = path.startswith(("packed", "one by one"))
        answers = str(sum(one.answers for one in some))
        table.add_row(path, str(count), *([*figures, answers] if measured else ["–"] * 4))
    Console(width=150).print(table)


def show_reasons(found: dict[str, Measured]) -> None:
    """Print why some families are not read in packs."""
    table = Table("family", "path", "reason", title="Why not in packs", title_justify="left")
    for name, one in found.items():
        if one.reason and not (name in VARIANTS and one.path == "unbuilt"):
            table.add_row(name, one.path, one.reason[:160])
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
