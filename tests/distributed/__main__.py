"""Measure every launch and method, two hosts with a pulled cable, and the cost of checkpoints.

    PYTHONPATH=tests python -m distributed [--quick]

Every launch trains every method on a tiny model with two ranks, uninterrupted and interrupted. The
embedded model trains over two network namespaces, and as the default recipe defines. Results are
written to build/matrix.json; a missed goal is an error.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from tiny import tiny_recipe

from distributed.trainings import (
    LAUNCHES,
    METHODS,
    Trainings,
    embedded_stage,
    farthest,
    losses,
    outcome,
    train_all,
)
from distributed.two_hosts import objection, pickled, two_hosts
from lora_core.files import write_json
from pipelines.config.recipe import parse_recipe
from pipelines.config.sections import LaunchSection
from pipelines.errors import RecipeError
from pipelines.runtime.launcher import REPOSITORY
from pipelines.runtime.sharding import check_launch
from pipelines.runtime.stage import Stage

RESULT = REPOSITORY / "build" / "matrix.json"
LOSS, WEIGHTS, COST = 2e-6, 5e-5, 0.02
STEPS = 6
"""Of the embedded model on two hosts."""
Row = dict[str, Any]


def main() -> int:
    """Measure, write and print everything; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one method under one launch")
    quick = parser.parse_args().quick
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        sections: dict[str, Callable[[Path], Iterator[Row]]] = {
            "Refused launches": refused,
            "Two ranks and one, interrupted and uninterrupted runs": launches,
            "The embedded model on two hosts, compared with two ranks of one host": hosts,
            "Cost of checkpoints": checkpoints,
        }
        if quick:
            one = partial(launches, names=LAUNCHES[2:3], methods=["QLoRA"])
            sections = {"Refused launches": refused, "One method under one launch": one}
        for title, section in sections.items():
            found = list(section(Path(folder)))
            show(title, found)
            rows += found
    write_json(RESULT.with_stem("matrix_quick") if quick else RESULT, rows)
    return 0 if all(row["holds"] is not False for row in rows) else 1


def launches(
    folder: Path, *, names: Sequence[str] = LAUNCHES, methods: Sequence[str] = tuple(METHODS)
) -> Iterator[Row]:
    """Train every method under every launch."""
    trainings = Trainings.prepare(folder)
    alone = {method: trainings.stage(method, "alone") for method in methods}
    train_all(
        "cpu_single", 1, [str(stage.folder) for stage in alone.values()], folder / "alone.log"
    )
    for name in names:
        uninterrupted, interrupted = (
            {method: trainings.stage(method, f"{name}{kind}", 2) for method in methods}
            for kind in ("", "-interrupted")
        )
        words = [str(stage.folder) for stage in uninterrupted.values()]
        words += [
            word
            for stage in interrupted.values()
            for word in (f"{stage.folder}:3", str(stage.folder))
        ]
        train_all(name, 2, words, folder / f"{name}.log")
        for method in methods:
            yield within(
                f"{name}, {method}: largest difference of a step's loss",
                apart(uninterrupted[method], alone[method]),
                "nats",
                LOSS,
            )
            weights = farthest(outcome(alone[method]), outcome(uninterrupted[method]))
            yield within(
                f"{name}, {method}: largest difference of a trained tensor",
                weights,
                "of its norm",
                WEIGHTS,
            )
            yield within(
                f"{name}, {method}: interrupted and resumed, loss",
                apart(interrupted[method], uninterrupted[method]),
                "nats",
                0,
            )


def refused(folder: Path) -> Iterator[Row]:
    """Use FSDP configs, as accelerate writes them; they are refused before anything starts."""
    for device, quantization in (("cpu", "nf4"), ("gpu", "nf4"), ("gpu", "none")):
        config = {
            "distributed_type": "FSDP",
            "fsdp_config": {"fsdp_version": 2},
            "use_cpu": device == "cpu",
            "num_processes": 2,
        }
        path = folder / f"fsdp_{device}.yaml"
        path.write_text(yaml.safe_dump(config))
        changes = {
            "launch": {"config": str(path), "processes": 2},
            "base_model": {"quantization": quantization},
        }
        try:
            check_launch(parse_recipe(tiny_recipe(folder, folder, **changes)))
            reason = None
        except RecipeError as error:
            reason = str(error).partition(" uses ")[2]
        yield row(
            f"FSDP2, {quantization}, {device}: {reason}",
            int(reason is not None),
            "refused",
            "1",
            holds=reason is not None,
        )


def hosts(folder: Path) -> Iterator[Row]:
    """Train the embedded model under ZeRO-2 on two hosts, with and without a pulled cable."""
    reason = objection()
    if reason is not None:
        yield row(f"two hosts: {reason}", 0, "")
        return
    settings = LaunchSection(config="cpu_zero2", processes=2, machines=2, timeout_seconds=30)
    often = {"steps": STEPS, "checkpoint_every": 2, "checkpoint_time_fraction": 1}
    one, two = (
        embedded_stage(folder / name, "QLoRA", settings, **often) for name in ("one-host", "hosts")
    )
    train_all("cpu_zero2", 2, [str(one.folder)], folder / "one-host.log")
    with two_hosts(folder / "hosts") as made:
        second, file = made.join(), pickled(two, settings, folder / "stage.pickle")
        first = made.train(file)
        wait_for(two, 3)
        made.pull_cable()
        started = time.monotonic()
        output, _ = first.communicate()
        yield within(
            "from pulling the cable to the end of the run",
            time.monotonic() - started,
            "s",
            settings.timeout_seconds + 30,
        )
        yield row(
            f"its last line: {output.strip().splitlines()[-1][:300]}",
            first.returncode,
            "status",
            "1",
            holds=first.returncode == 1,
        )
        made.plug_cable()
        again = made.train(file)
        again.communicate()
        second.terminate()
        second.communicate()
    yield within(
        "two hosts, interrupted, compared with two ranks of one host: loss",
        apart(two, one),
        "nats",
        2e-5,
    )
    yield within(
        "the same: largest difference of a trained tensor",
        farthest(outcome(one), outcome(two)),
        "of its norm",
        1e-3,
    )


def checkpoints(folder: Path) -> Iterator[Row]:
    """Train as the default recipe defines, and the control again with every checkpoint written."""
    settings = LaunchSection(config="cpu_zero2", processes=2)
    for method, often in (("QLoRA", {}), ("full", {}), ("full", {"checkpoint_time_fraction": 1})):
        name = f"{method}, {'every checkpoint written' if often else 'as the recipe defines'}"
        stage = embedded_stage(folder / name, method, settings, **often)
        train_all("cpu_zero2", 2, [str(stage.folder)], folder / f"{name}.log")
        result = stage.result()
        assert result is not None
        cost = result.checkpoints
        training_seconds = result.totals.training_seconds
        seconds = cost.seconds + cost.background_seconds
        fraction = seconds / training_seconds
        yield row(
            f"{name}: checkpoints written",
            cost.written,
            f"in {training_seconds:.0f} s",
        )
        if often:
            yield row(
                f"{name}: seconds that training waited for each",
                cost.seconds / cost.written,
                "s",
            )
            yield row(
                f"{name}: CPU seconds in background for each",
                cost.background_seconds / cost.written,
                "s",
            )
        yield (
            row(f"{name}: both", fraction, "of its training time")
            if often
            else within(f"{name}: both", fraction, "of its training time", COST)
        )


def apart(one: Stage, other: Stage) -> float:
    """Return the largest difference of a step's loss."""
    pairs = zip(losses(one), losses(other), strict=True)
    return max(abs(a - b) for a, b in pairs)


def wait_for(stage: Stage, steps: int) -> None:
    """Wait until that many steps are done."""
    metrics = stage.folder / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < steps:
        time.sleep(0.2)


def within(what: str, value: float, unit: str, most: float) -> Row:
    """Return a result that must be at most `most`."""
    return row(what, value, unit, f"<= {most:g}", holds=value <= most)


def row(
    what: str, value: float, unit: str, goal: str | None = None, *, holds: bool | None = None
) -> Row:
    """Return one result."""
    return {"what": what, "value": value, "unit": unit, "goal": goal, "holds": holds}


def show(title: str, rows: list[Row]) -> None:
    """Print one section."""
    table = Table("what", "value", "unit", "goal", "holds", title=title, title_justify="left")
    for one in rows:
        holds = {None: "", True: "yes", False: "NO"}[one["holds"]]
        table.add_row(one["what"], f"{one['value']:.3g}", one["unit"], one["goal"] or "", holds)
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
