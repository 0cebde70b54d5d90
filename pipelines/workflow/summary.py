"""The summary of a run: what was compared with what, on which base and data, by which code; the values of summary.json."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config.experiments import EvaluatedModel
from pipelines.runtime.stage import Stage, digest, library_versions, read_records
from pipelines.workflow.incumbent import Champion
from pipelines.workflow.run import Figures, Run, Trained

Tuning = dict[float, float]
"""Learning rate of a control → its loss on the examples kept for choosing one."""
DISTRIBUTIONS = "distributions.safetensors"


def summarize(
    run: Run,
    base: Figures,
    data: Figures,
    trained: Sequence[Trained],
    beside: tuple[Tuning, Champion | None],
    evaluated: Mapping[EvaluatedModel, Stage],
) -> dict[str, Any]:
    """Compare everything with everything and return the summary.

    Args:
        run: the run.
        base: what the base's stage reported.
        data: what the data's stage reported.
        trained: the control and the adapters.
        beside: the losses by which the control's rate was chosen, and the registered champion.
        evaluated: every model that was scored.
    """
    from pipelines.comparison import comparison

    tuning, champion = beside
    folders = {subject.label: stage.folder for subject, stage in evaluated.items()}
    distributions = {
        label: folder / DISTRIBUTIONS
        for label, folder in folders.items()
        if (folder / DISTRIBUTIONS).is_file()
    }
    variants = [
        _variant(run, subject)
        for subject in evaluated
        if subject.arm is not None and not subject.whole
    ]
    known = (
        None
        if champion is None
        else comparison.Incumbent(champion.version, champion.adapter_sha256, champion.objection)
    )
    paths = {label: str(folder / "items.jsonl") for label, folder in folders.items()}
    items = {label: read_records(Path(path)) for label, path in paths.items()}
    compared = comparison.compare(
        run.recipe,
        [_trained(one) for one in trained],
        items,
        comparison.Beside(distributions, tuning, known, variants),
    )
    return {
        "name": run.recipe.name,
        "key": digest(
            [run.recipe.model_dump(mode="json"), sorted(stage.key for stage in evaluated.values())]
        ),
        "seed": run.recipe.seed,
        "recipe": run.recipe.model_dump(mode="json"),
        "commit": _commit(),
        "versions": library_versions(),
        "machine": _machine(trained),
        "base": base,
        "data": data,
        "items": paths,
        "forward": _forward(trained, evaluated),
        "spectrum": {
            one.arm.label: one.figures["spectrum"] for one in trained if "spectrum" in one.figures
        },
        **compared,
    }


def _forward(
    trained: Sequence[Trained], evaluated: Mapping[EvaluatedModel, Stage]
) -> dict[str, dict[str, Any]]:
    """Return, for each model, how well the ways in which it was trained and scored agree with its own forward."""
    training = {one.arm.label: one.figures.get("forward") for one in trained}
    scoring = {
        subject.label: (stage.result() or {}).get("forward") for subject, stage in evaluated.items()
    }
    return {
        label: {"training": training.get(label), "scoring": one} for label, one in scoring.items()
    }


def _trained(one: Trained) -> Any:
    """Return a judged model as the comparison takes it; its spectrum stands by itself in the summary."""
    from pipelines.comparison.comparison import Trained as Judged

    figures = {name: value for name, value in one.figures.items() if name != "spectrum"}
    return Judged(one.arm.label, one.arm.rank, one.stage.key, str(one.stage.folder), figures)


def _variant(run: Run, subject: EvaluatedModel) -> Any:
    """Return a model that only the frontier shows as the comparison takes it."""
    from pipelines.comparison.comparison import Variant

    arm = subject.arm
    assert arm is not None, "a registered champion is no variant"
    rank, cut_from = (arm.rank, None) if subject.cut is None else (subject.cut, arm.rank)
    return Variant(
        subject.label,
        arm.method,
        rank,
        subject.step or run.recipe.training.steps,
        arm.learning_rate,
        cut_from,
    )


def _machine(trained: Sequence[Trained]) -> str:
    """Return what the run was computed on: the GPUs where there were any, and the host."""
    processors = dict.fromkeys(one.figures.get("processor", "CPU") for one in trained)
    gpus = [name for name in processors if name != "CPU"]
    return ", ".join([*gpus, f"{os.cpu_count()} cores", platform.machine(), platform.system()])


def _commit() -> str:
    """Return the commit of the code, with a mark where files differ from it."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
